"""How fast frames are decoded, and so how long what waits will take: never more than the truth.

A request is refused for its deadline only if it could not be met even at the best speed seen of
late, with nothing before it but what waits before it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MEASURED_SECONDS = 0.25  # of decoding for one figure
REMEMBERED_SECONDS = 60.0


class Forecast:
    """In frames, of all requests together. Used by one thread at a time."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._frames = self._seconds = 0.0
        self._figures: deque[tuple[float, float]] = deque()  # (when, frames a second)

    def add(self, frames: float, seconds: float) -> None:
        """That so much was decoded in so long."""
        self._frames += frames
        self._seconds += seconds
        if self._seconds >= MEASURED_SECONDS:
            self._figures.append((self._now(), self._frames / self._seconds))
            self._frames = self._seconds = 0.0

    def seconds(self, frames: float) -> float:
        """What so many take at least; 0 where nothing is known."""
        oldest = self._now() - REMEMBERED_SECONDS
        while self._figures and self._figures[0][0] < oldest:
            self._figures.popleft()
        best = max((rate for _, rate in self._figures), default=0.0)
        return frames / best if best else 0.0
