"""How fast work is done, and so how long what waits will take: no more than the truth.

A request is refused for its deadline only if it could not be met even at the best speed seen of
late, with nothing before it but what runs and what waits before it. Which unit work is measured in
is for admission.py to say.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MEASURED_SECONDS = 0.25  # of decoding for one figure
REMEMBERED_SECONDS = 60.0
REMEMBERED = 5  # figures; the best counts, so that a slower machine is known after so many


@dataclass
class _Speed:
    """With so many slots at work: (when, units a second of all), and what is not yet a figure."""

    figures: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    units: float = 0.0
    seconds: float = 0.0


class Forecast:
    """In some unit of work, of all requests together. Used by one thread at a time."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._speeds: dict[int, _Speed] = {}  # by the number of slots at work

    def add(self, units: float, seconds: float, slots: int) -> None:
        """That so much was decoded in so long, by so many slots."""
        speed = self._speeds.get(slots)
        if speed is None:
            speed = self._speeds[slots] = _Speed()
        speed.units += units
        speed.seconds += seconds
        if speed.seconds >= MEASURED_SECONDS:
            speed.figures.append((self._now(), speed.units / speed.seconds))
            speed.units = speed.seconds = 0.0

    def rate(self, slots: int) -> float:
        """Units a second of so many slots at most; infinite where nothing is known.

        More slots together are no slower than fewer, and each of them is no faster.
        """
        best = {number: rate for number in self._speeds if (rate := self._best(number))}
        if slots in best:
            return best[slots]
        bounds = [rate * max(slots / number, 1.0) for number, rate in best.items()]
        return min(bounds, default=float("inf"))

    def seconds(self, slots: int, running: Iterable[float], waiting: Iterable[float]) -> float:
        """Until the last of `waiting` is decoded, at least.

        running: what slots have left to decode; waiting: of those that get a slot in
        this order. Slots that are at work go on alike.
        """
        ends = list(running)  # in units that each slot at work decodes from now on
        heapq.heapify(ends)
        done = seconds = 0.0
        last = 0.0

        def first_to_end() -> None:
            nonlocal done, seconds
            active = len(ends)
            end = heapq.heappop(ends)
            seconds += max(end - done, 0.0) * active / self.rate(active)
            done = max(end, done)

        for units in waiting:
            while len(ends) >= slots:
                first_to_end()
            last = done + units
            heapq.heappush(ends, last)
        while ends and done < last:
            first_to_end()
        return seconds

    def _best(self, slots: int) -> float:
        """0 where nothing is known."""
        figures, oldest = self._speeds[slots].figures, self._now() - REMEMBERED_SECONDS
        while figures and figures[0][0] < oldest:
            figures.popleft()
        return max((rate for _, rate in figures), default=0.0)
