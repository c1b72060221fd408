"""Whether one more request is taken: is there room in the queue, and time until its deadline?

Knows no thread and has no lock; the scheduler asks under its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from .core import QueueFullError, SlotStep
from .errors import DeadlineTooShortError
from .forecast import Forecast
from .running import Running
from .submission import Submission, Work
from .waiting import Waiting

SHARE_FOR_OTHERS = 4  # a quarter of the queue cannot be filled by one client alone
OTHERS_SECONDS = 60.0  # for which a client counts that has asked for something
LEAST_RETRY, MOST_RETRY = 0.1, 10.0  # seconds after which a refused request may come again


class Admission:
    """queue_size: requests that may wait, for one of so many slots."""

    def __init__(
        self, slots: int, queue_size: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        # A step takes longer the more rows it has, but less than in proportion. So each unit says
        # too long after some that were unlike what is to come: rows after narrower steps, frames
        # after guided ones, samples after longer clips. What the least of them says, counts.
        self.forecasts = tuple(Forecast() for _ in Work._fields)
        self._slots, self._size, self._now = slots, queue_size, now
        self._asked: OrderedDict[str, float] = OrderedDict()  # by client: when last; latest last

    def check_room(self, waiting: Waiting, client: str, *, certain: bool = True) -> None:
        """QueueFullError if a request of this client finds no room.

        Where others have asked too of late, one client that has a name cannot fill all of it.
        certain: the request is to this queue, so that its client counts as one of them from now on.
        """
        if certain and client:
            self._note(client)
        others = bool(client) and self._there_are_others(client)
        number, own = len(waiting), waiting.of(client)
        if number >= self._size:
            problem = f"the queue is full: {self._size} requests are waiting"
        elif others and own >= self._size - self._size // SHARE_FOR_OTHERS:
            problem = f"{own} requests of this client are waiting, as many as one may have"
        else:
            return
        rows = sum((each.samples - each.started) * each.work.rows for each in waiting)
        one = rows / self.forecasts[0].rate(self._slots) / number
        raise QueueFullError(problem, min(max(one, LEAST_RETRY), MOST_RETRY))

    def check_time(
        self,
        waiting: Waiting,
        running: Iterable[Running],
        new: Submission,
        timeout: float,
    ) -> None:
        """DeadlineTooShortError if it cannot be finished in so many seconds."""
        left = [each.left for each in running]
        works = [each.work for each in waiting.before(new.client)] + [new.work] * new.samples
        needed = min(
            forecast.seconds(self._slots, [each[unit] for each in left], [w[unit] for w in works])
            for unit, forecast in enumerate(self.forecasts)
        )
        if needed > timeout:
            raise DeadlineTooShortError(
                f"the deadline is in {timeout:.3g} s, but at its present speed the server needs "
                f"{needed:.3g} s or more, with what comes before this request"
            )

    def learn(self, step: list[tuple[Running, SlotStep]], seconds: float) -> None:
        """What a step did for those that had a part in it, at least one, and how long it took."""
        done = [running.advanced(result) for running, result in step]
        if any(running.request.schedule == "raster" for running, _ in step):
            return  # slower than anything that is decoded in waves
        if any(result.prefill for _, result in step):
            seconds = 0.0  # they went into what is given
        for forecast, units in zip(self.forecasts, zip(*done, strict=True), strict=True):
            forecast.add(sum(units), seconds, len(step))

    def _note(self, client: str) -> None:
        self._asked[client] = self._now()
        self._asked.move_to_end(client)

    def _there_are_others(self, client: str) -> bool:
        before = self._now() - OTHERS_SECONDS
        while self._asked and next(iter(self._asked.values())) < before:
            self._asked.popitem(last=False)
        return len(self._asked) > (client in self._asked)
