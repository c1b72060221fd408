"""Numbers of the calls that are refused for lack of room, in a line of the log now and then.

While there is too much to do, a line for each of them would be too much, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from .logs import fields

log = logging.getLogger("nuwa.runtime")

REASONS = ("QUEUE_FULL", "DEADLINE_TOO_SHORT")  # of ErrorInfo
INTERVAL = 10.0


class Refusals:
    """interval: the least seconds between two lines. Safe to use from any thread."""

    def __init__(
        self, interval: float = INTERVAL, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval, self._now = interval, now
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._first = 0.0  # when the first of those counted came
        self._told = float("-inf")

    def count(self, reason: str) -> None:
        """An error that a client is told of; only those of REASONS count."""
        if reason not in REASONS:
            return
        with self._lock:
            if not self._counts:
                self._first = self._now()
            self._counts[reason] += 1

    def tell(self, *, last: bool = False) -> None:
        """Writes the line if there is something to say, and if it is time; last: also if not."""
        with self._lock:
            now = self._now()
            if not self._counts or not (last or now >= self._told + self._interval):
                return
            counts, self._counts = self._counts, Counter()
            seconds, self._told = now - self._first, now
        _write(counts, seconds)


def _write(counts: Counter[str], seconds: float) -> None:
    known = {reason: counts[reason] for reason in REASONS if counts[reason]}
    log.warning(
        "%d requests refused in %.1f s: %s",
        counts.total(),
        seconds,
        ", ".join(f"{reason} {count}" for reason, count in known.items()),
        extra=fields(
            refused=counts.total(),
            seconds=round(seconds, 3),
            **{reason.lower(): count for reason, count in known.items()},
        ),
    )
