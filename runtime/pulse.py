"""Whether work that began also ends: for how long each thread has been in a call of the engine.

Read by health checks, which so cost the engine nothing and never wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pulse:
    """Safe to use from any thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since: dict[int, float] = {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around a call of the engine; not around another one of the same thread."""
        thread = threading.get_ident()
        self._since[thread] = self._now()
        try:
            yield
        finally:
            del self._since[thread]

    def longest(self) -> float:
        """Seconds of the call that has lasted longest; 0 while none is under way."""
        now = self._now()
        return max((now - since for since in list(self._since.values())), default=0.0)
