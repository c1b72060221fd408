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

    def time_to_first_frame(self, given: int = 0) -> float | None:
        """Until the first that was made: the first `given` are those that were sent."""
        made = self.frames[given:]
        return made[0] - self.scheduled if made else None

    def time_per_frame(self, given: int = 0) -> float | None:
        """From one that was made to the next, on average; None for fewer than two."""
        made = self.frames[given:]
        return (made[-1] - made[0]) / (len(made) - 1) if len(made) > 1 else None

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
