"""Who computes on how many of a processor's cores, so that hardly more threads run than there are.

Threads of a step wait for each other many times. If one of them has to share its core with a
thread that makes pixels, all wait, and a step of two threads takes longer than one of a single
thread. So calls beside the steps say how many cores they take, and steps of the native decoder take
the others (ONNX Runtime's always take all).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


class Cores:
    """`total` cores, of which a call beside steps takes `share`.

    One such call prepares and one makes pixels at a time: from four cores on they leave half.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.share = max(1, total // 4)
        self._lent = 0
        self._free = np.array([total], np.int32)
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Those that are left for a step, at least one."""
        return int(self._free[0])

    @property
    def address(self) -> int:
        """Where `free` is, as an int32, for those who ask while nothing of Python runs."""
        return self._free.ctypes.data

    @contextmanager
    def lend(self, count: int) -> Iterator[None]:
        """Takes so many for a while."""
        self._change(count)
        try:
            yield
        finally:
            self._change(-count)

    def _change(self, count: int) -> None:
        with self._lock:
            self._lent += count
            self._free[0] = max(1, self.total - self._lent)
