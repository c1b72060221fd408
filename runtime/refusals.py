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
MOST_METHODS = 32  # that a line names, more than there are: a client may call any name
OTHERS = "others"


class Refusals:
    """interval: the least seconds between two lines. Safe to use from any thread."""

    def __init__(
        self, interval: float = INTERVAL, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval, self._now = interval, now
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._methods: Counter[str] = Counter()
        self._first = 0.0  # when the first of those counted came
        self._told = float("-inf")

    def count(self, reason: str, method: str) -> None:
        """An error that a client of this method is told of; only those of REASONS count."""
        if reason not in REASONS:
            return
        with self._lock:
            if not self._counts:
                self._first = self._now()
            self._counts[reason] += 1
            known = method in self._methods or len(self._methods) < MOST_METHODS
            self._methods[method if known else OTHERS] += 1

    def tell(self, *, last: bool = False) -> None:
        """Writes the line if there is something to say, and if it is time; last: also if not."""
        with self._lock:
            now = self._now()
            if not self._counts or not (last or now >= self._told + self._interval):
                return
            counts, self._counts = self._counts, Counter()
            methods, self._methods = self._methods, Counter()
            seconds, self._told = now - self._first, now
        _write(counts, methods, seconds)


def _write(counts: Counter[str], methods: Counter[str], seconds: float) -> None:
    known = {reason: counts[reason] for reason in REASONS if counts[reason]}
    called = dict(methods.most_common())
    log.warning(
        "%d requests refused in %.1f s: %s; of %s",
        counts.total(),
        seconds,
        _list(known),
        _list(called),
        extra=fields(
            refused=counts.total(),
            seconds=round(seconds, 3),
            **{reason.lower(): count for reason, count in known.items()},
            methods=called,
        ),
    )


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
