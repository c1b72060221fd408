"""Threads that help another one, on processors other than its own.

A thread that is woken may be put onto the processor of the one that woke it, although others are
idle, and stays there until the system moves one of the two, which takes milliseconds: as long as
all there is to do. native/team.h does the same for the threads of a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Helpers(ThreadPoolExecutor):
    """A pool of so many threads, all of which run from the beginning.

    Where the system lets nobody say where threads run, they run anywhere.
    """

    def __init__(self, count: int, name: str) -> None:
        self._ids: list[int] = []
        self._avoided = -1
        self._placing = threading.Lock()
        super().__init__(count, name, initializer=self._begin)
        here = threading.Barrier(count + 1)
        for _ in range(count):
            self.submit(here.wait)
        here.wait()

    def keep_off(self) -> None:
        """The helpers leave the caller's processor to it, as long as nobody else asks."""
        here = _processor()
        if here == self._avoided:
            return
        with self._placing:
            self._avoided = here
            # A sandbox may forbid it, and a thread may have ended.
            with contextlib.suppress(OSError):
                others = os.sched_getaffinity(0) - {here}
                for thread in self._ids if others else ():
                    os.sched_setaffinity(thread, others)

    def _begin(self) -> None:
        self._ids.append(threading.get_native_id())


def _find() -> Callable[[], int]:
    """sched_getcpu, or what says -1 where there is none, or no affinity of threads."""
    found = getattr(ctypes.CDLL(None), "sched_getcpu", None) if os.name == "posix" else None
    if found is None or not hasattr(os, "sched_setaffinity"):
        return lambda: -1
    return found


_processor = _find()
