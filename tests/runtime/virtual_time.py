"""Virtual time for tests of what takes time: it passes only when no thread has anything to do.

Inside `passing(monkeypatch)`, `time.sleep` and `time.perf_counter` are of a clock that stands still
while any thread of the process runs, or waits for a processor or for the interpreter's lock, and
leaps to the next sleeper's end when none does. What a test sleeps is then exactly what is measured,
however busy the machine is, and it takes no time. Waits with a limit (`Event.wait(1.0)`), the
timers of asyncio and those of gRPC stay in real time, as do other processes: nothing that is
measured may depend on them. Linux only: it reads the states of threads from /proc.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_TASKS = Path("/proc/self/task")
_LOOK = 0.0005  # real seconds between two looks at the threads
_sleep = time.sleep


class VirtualTime:
    """now: seconds, as `time.perf_counter` gives them meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, int, threading.Event]] = []
        self._lock = threading.Lock()
        self._order, self._over = 0, False
        self._mover = threading.Thread(target=self._move, name="virtual-time", daemon=True)

    def sleep(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        woken = threading.Event()
        with self._lock:
            heapq.heappush(self._sleepers, (self.now + seconds, self._order, woken))
            self._order += 1
        woken.wait()

    def _move(self) -> None:
        """One sleeper at a time, so that what one of them sets off is done before the next."""
        before = None
        while not self._over:
            _sleep(_LOOK)  # lets go of the interpreter's lock: who waits for it is seen to run
            idle = _idle()
            if idle is None or idle != before:
                before = idle
                continue
            before = None
            with self._lock:
                if self._sleepers:
                    self.now, _, woken = heapq.heappop(self._sleepers)
                    woken.set()

    def start(self) -> None:
        self._mover.start()

    def stop(self) -> None:
        """Whoever still sleeps is woken, at once."""
        self._over = True
        self._mover.join()
        for _, _, woken in self._sleepers:
            woken.set()


def _idle() -> dict[str, bytes] | None:
    """How often each thread but this one was given a processor, by its number; None if one runs."""
    counts, mine = {}, str(threading.get_native_id())
    for name in os.listdir(_TASKS):
        if name == mine:
            continue
        try:
            status = (_TASKS / name / "status").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None  # it has just ended
        if b"\nState:\tS" not in status:
            return None
        counts[name] = status[status.index(b"\nvoluntary_ctxt_switches") :]
    return counts


@contextlib.contextmanager
def passing(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualTime]:
    """What happens inside is in virtual time, in all threads."""
    virtual = VirtualTime()
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", virtual.sleep)
        patch.setattr(time, "perf_counter", lambda: virtual.now)
        virtual.start()
        try:
            yield virtual
        finally:
            virtual.stop()
