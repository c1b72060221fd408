"""One request in the scheduler: its handle, its samples, and where its time went.

No lock and no queue of its own: see Scheduler for which thread may change what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from nuwa.spec.conditions import lane_texts

from .core import GenerationRequest, Timings
from .engine_protocol import Prepared
from .handle import Handle


class Work(NamedTuple):
    """What there is to decode, in three units: rows, in frames of one lane; frames; samples."""

    rows: float
    frames: float
    samples: float


@dataclass(eq=False)
class Submission:
    """`samples` sequences that share one handle. client: who asks, for fairness among them.

    started: samples that got a slot; finished: samples that are decoded; prepared: the request as
    the engine has encoded it, None while it has not, or when no sample will need it; sample_bytes:
    of the frames of one. encode,
    decode, prefill and pixels are the seconds in which the engine worked for at least one of them;
    steps are counted likewise.
    """

    handle: Handle
    samples: int
    client: str = ""
    started: int = 0
    finished: int = 0
    prepared: Prepared | None = None
    sample_bytes: int = 0
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

    @cached_property
    def work(self) -> Work:
        """Of each sample, without what is given; of an edit at least so much."""
        request = self.handle.request
        drawn = float(request.frame_count - self.given_frames)
        if request.mask is not None:  # of tokens no smaller a part than of pixels
            drawn *= float(request.mask.mean())
        return Work(drawn * self.lanes, drawn, 1.0)

    @cached_property
    def lanes(self) -> int:
        request = self.handle.request
        return len(lane_texts(request.prompt, request.sampling.guidance_scale))

    @cached_property
    def given_frames(self) -> int:
        """Whole frames that are given, before those that are drawn."""
        request = self.handle.request
        return 0 if request.frames is None or request.mask is not None else len(request.frames)

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
    def read(self) -> bool:
        """Whether its reader keeps up, so that its next sample may begin."""
        return self.handle.has_room(self.started, self.sample_bytes)

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
