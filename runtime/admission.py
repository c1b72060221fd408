"""Whether one more request is taken: is there room in the queue, and time until its deadline?

Knows no thread and has no lock; the scheduler asks under its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from .core import GenerationRequest, QueueFullError
from .errors import DeadlineTooShortError
from .forecast import Forecast
from .running import Running
from .waiting import Waiting

SHARE_FOR_OTHERS = 4  # a quarter of the queue cannot be filled by one client alone
OTHERS_SECONDS = 60.0  # for which a client counts that has asked for something
LEAST_RETRY, MOST_RETRY = 0.1, 10.0  # seconds after which a refused request may come again


class Admission:
    """queue_size: requests that may wait, for one of so many slots."""

    def __init__(
        self, slots: int, queue_size: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.forecast = Forecast()
        self._slots, self._size, self._now = slots, queue_size, now
        self._asked: OrderedDict[str, float] = OrderedDict()  # by client: when last; latest last

    def check_room(self, waiting: Waiting, client: str) -> None:
        """QueueFullError if a request of this client finds no room.

        Where others have asked too of late, one client that has a name cannot fill all of it.
        """
        others = bool(client) and self._there_are_others(client)
        number, own = len(waiting), waiting.of(client)
        if number >= self._size:
            problem = f"the queue is full: {self._size} requests are waiting"
        elif others and own >= self._size - self._size // SHARE_FOR_OTHERS:
            problem = f"{own} requests of this client are waiting, as many as one may have"
        else:
            return
        frames = sum(each.frames_left for each in waiting)
        one = frames / self.forecast.rate(self._slots) / number
        raise QueueFullError(problem, min(max(one, LEAST_RETRY), MOST_RETRY))

    def check_time(
        self,
        waiting: Waiting,
        running: Iterable[Running],
        request: GenerationRequest,
        *,
        samples: int,
        timeout: float,
        client: str,
    ) -> None:
        """DeadlineTooShortError if it cannot be finished in so many seconds."""
        frames = [*waiting.frames_before(client), *[request.frame_count] * samples]
        left = [each.frames_left for each in running]
        needed = self.forecast.seconds(self._slots, left, frames)
        if needed > timeout:
            raise DeadlineTooShortError(
                f"the deadline is in {timeout:.3g} s, but at its present speed the server needs "
                f"{needed:.3g} s or more, with what comes before this request"
            )

    def _there_are_others(self, client: str) -> bool:
        now = self._now()
        self._asked[client] = now
        self._asked.move_to_end(client)
        while now - next(iter(self._asked.values())) > OTHERS_SECONDS:
            self._asked.popitem(last=False)
        return len(self._asked) > 1
