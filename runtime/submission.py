"""One request in the scheduler: its handle, its samples, and where its time went.

No lock and no queue of its own: see Scheduler for which thread may change what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .core import GenerationRequest, Timings
from .engine_protocol import Prepared
from .handle import Handle


@dataclass(eq=False)
class Submission:
    """`samples` sequences that share one handle. client: who asks, for fairness among them.

    started: samples that got a slot; finished: samples that are decoded; prepared: the request as
    the engine has encoded it, None while it has not, or when no sample will need it. encode,
    decode, prefill and pixels are the seconds in which the engine worked for at least one of them;
    steps are counted likewise.
    """

    handle: Handle
    samples: int
    client: str = ""
    started: int = 0
    finished: int = 0
    prepared: Prepared | None = None
    queue: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    prefill: float = 0.0
    pixels: float = 0.0
    steps: int = 0

    def start_next(self) -> GenerationRequest:
        """The engine's request for the next sample."""
        request = self.handle.request
        index = request.sample_index + self.started
        self.started += 1
        return replace(request, sample_index=index)

    @property
    def frames_left(self) -> int:
        """Of the samples that have no slot yet."""
        return (self.samples - self.started) * self.handle.request.frame_count

    @property
    def running(self) -> int:
        """Samples that hold a slot."""
        return self.started - self.finished

    def discard(self) -> None:
        """Gives back what was encoded; harmless if nothing is."""
        if self.prepared is not None:
            self.prepared.close()
            self.prepared = None

    @property
    def all_started(self) -> bool:
        return self.started == self.samples

    @property
    def all_finished(self) -> bool:
        return self.finished == self.samples

    def timings(self, now: float) -> Timings:
        """What Done tells; `now` is of time.perf_counter."""
        total = now - self.handle.submitted
        return Timings(
            queue=self.queue,
            encode=self.encode,
            decode=self.decode,
            pixels=self.pixels,
            total=total,
            steps=self.steps,
            prefill=self.prefill,
        )
