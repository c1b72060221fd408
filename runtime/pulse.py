"""Whether work that began also ends: for how long each thread has been in a call of the engine, and
the loop that decodes has not come round although there is work.

Read by health checks, which so cost the engine nothing and never wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class _AtWork:
    """Notes since when a thread is in its block. No generator: there is one for every step."""

    __slots__ = ("_now", "_since")

    def __init__(self, since: dict[int, float], now: Callable[[], float]) -> None:
        self._since, self._now = since, now

    def __enter__(self) -> None:
        self._since[threading.get_ident()] = self._now()

    def __exit__(self, *_exception: object) -> None:
        del self._since[threading.get_ident()]


class Pulse:
    """Safe to use from any thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since: dict[int, float] = {}
        self._came_round: float | None = None  # None while there is no work

    def at_work(self) -> _AtWork:
        """Around a call of the engine; not around another one of the same thread."""
        return _AtWork(self._since, self._now)

    def comes_round(self) -> None:
        """The loop begins another round."""
        self._came_round = self._now()

    def has_work(self) -> None:
        """There is work for the loop, from now on if there was none."""
        if self._came_round is None:
            self._came_round = self._now()

    def rests(self) -> None:
        """The loop has nothing to do."""
        self._came_round = None

    def longest(self) -> float:
        """Seconds of the call or round that has lasted longest; 0 while none is under way."""
        now, round = self._now(), self._came_round
        began = list(self._since.values()) + ([] if round is None else [round])
        return max((now - since for since in began), default=0.0)
