"""Threads of the native library that run what prepares a request, or what makes pixels."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_void_p

from ..errors import UnavailableError
from .cores import Cores


class NativeTeam:
    """As many threads as there are cores; UnavailableError where there are none.

    What runs on them (native_frames.py, native_encoders.py) has one turn at a time, and keeps the
    team for as long as it is there itself.
    """

    def __init__(self, library: ctypes.CDLL, cores: Cores) -> None:
        self.library, self._cores = library, cores
        self._process, self._lock = os.getpid(), threading.Lock()
        address = library.nuwa_team_new(cores.total)
        if not address:
            raise UnavailableError(f"there are no {cores.total} threads")
        self.address = c_void_p(address)

    def __del__(self) -> None:
        if hasattr(self, "address") and self.here:
            self.library.nuwa_team_free(self.address)

    @property
    def here(self) -> bool:
        """Whether this is the process that has the threads, and not one forked off it."""
        return os.getpid() == self._process

    @contextmanager
    def turn(self, busy: bool) -> Iterator[int]:
        """How many threads may be used meanwhile; busy: others need cores too."""
        if not self.here:
            raise RuntimeError("a forked process has none of the threads; load the bundle there")
        used = self._cores.share if busy else self._cores.total
        with self._lock, self._cores.lend(used):
            yield used
