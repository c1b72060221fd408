"""One request as a benchmark saw it. All times are of time.perf_counter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core import Timings

OK = "ok"


@dataclass(frozen=True)
class Observation:
    """scheduled: when it was due; sent: when it was; frames: when each of its frames had come.

    status: "ok", or the reason of the error. timings: what the server says of it.
    """

    scheduled: float
    sent: float
    ended: float
    status: str = OK
    frames: tuple[float, ...] = ()
    timings: Timings = Timings()

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def latency(self) -> float:
        """From when it was due: who comes late to send it waits, too."""
        return self.ended - self.scheduled

    @property
    def time_to_first_frame(self) -> float | None:
        return self.frames[0] - self.scheduled if self.frames else None

    @property
    def time_per_frame(self) -> float | None:
        """From one frame to the next, on average; None for fewer than two."""
        if len(self.frames) < 2:
            return None
        return (self.frames[-1] - self.frames[0]) / (len(self.frames) - 1)

    @property
    def client(self) -> float:
        """What is not the server's: the way there and back, and reading the answer."""
        return max(self.ended - self.sent - self.timings.total, 0.0)


def together(observations: Iterable[Observation]) -> Observation:
    """Requests that were sent at once, as one that ends with the last of them."""
    each = list(observations)
    failed = next((one.status for one in each if not one.ok), OK)
    return Observation(
        min(one.scheduled for one in each),
        min(one.sent for one in each),
        max(one.ended for one in each),
        failed,
        tuple(sorted(time for one in each for time in one.frames)),
        max((one.timings for one in each), key=lambda timings: timings.total),
    )
