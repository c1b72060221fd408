"""How many generations of each model and task there were, how they ended, where time went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from nuwa.spec.tasks import Task

from .core import Timings

Key = tuple[str, Task]  # a model with its version, and one of its tasks


@dataclass(frozen=True)
class TaskStatistics:
    """Since the server started. seconds: summed over the successful ones; last_time: when the last
    one ended, in seconds since the epoch, 0 if there was none.
    """

    succeeded: int = 0
    failed: int = 0
    seconds: Timings = Timings()
    failed_seconds: float = 0.0
    last_time: float = 0.0


class Statistics:
    """Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[Key, TaskStatistics] = {}

    def __getitem__(self, key: Key) -> TaskStatistics:
        with self._lock:
            return self._tasks.get(key, TaskStatistics())

    def add(self, key: Key, timings: Timings) -> None:
        """A generation that succeeded."""
        with self._lock:
            now = self._tasks.get(key, TaskStatistics())
            sums = {
                name: getattr(now.seconds, name) + value for name, value in vars(timings).items()
            }
            self._tasks[key] = replace(
                now,
                succeeded=now.succeeded + 1,
                seconds=Timings(**sums),
                last_time=time.time(),
            )

    def fail(self, key: Key, seconds: float) -> None:
        """A generation that did not, after so long."""
        with self._lock:
            now = self._tasks.get(key, TaskStatistics())
            self._tasks[key] = replace(
                now,
                failed=now.failed + 1,
                failed_seconds=now.failed_seconds + seconds,
                last_time=time.time(),
            )
