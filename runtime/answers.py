"""The latest answers, so that a request that is sent again is answered and not generated again.

For calls that clients retry: the first try may have been carried out although its answer was lost.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from .core import CancelledError, QueueFullError

M = TypeVar("M", bound=Message)  # of one key always the same kind

KEPT_SECONDS = 300.0
KEPT_BYTES = 64 * 2**20
POLL_SECONDS = 0.05
MOST_FOLLOWERS = 8  # calls that wait for one answer; a client that tries again makes one or two


@dataclass(eq=False)
class _Answer:
    ready: threading.Event = field(default_factory=threading.Event)
    message: Message | None = None  # None when ready: it failed
    followers: int = 0
    about: Any = None
    size: int = 0
    time: float = 0.0


class Answers:
    """Of the last `seconds`, the latest `most_bytes` of them. Safe to use from any thread."""

    def __init__(
        self,
        *,
        seconds: float = KEPT_SECONDS,
        most_bytes: int = KEPT_BYTES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._most, self._now = seconds, most_bytes, now
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        """Answers that are kept or being made; some of them may have become too old."""
        return len(self._answers)

    def once(
        self,
        key: bytes,
        make: Callable[[], tuple[M, Any]],
        wanted: Callable[[], bool],
        again: Callable[[Any], None] = lambda about: None,
    ) -> M:
        """The answer kept under `key`, or that of make(), which is kept.

        A call whose key is being made elsewhere waits for that one, and makes its own if it fails,
        perhaps because its client is gone; QueueFullError where MOST_FOLLOWERS wait already, which
        no queue counts. wanted: whether to go on waiting; CancelledError if not.
        What make() raises comes through and is not kept. With the answer it says what it is about,
        which again() is called with whenever the answer is given again.
        """
        while True:
            with self._lock:
                self._forget()
                found = self._answers.get(key)
                if found is None:
                    mine = self._answers[key] = _Answer()
                    break
                if not found.ready.is_set() and found.followers >= MOST_FOLLOWERS:
                    raise QueueFullError(
                        f"{MOST_FOLLOWERS} calls with this very request wait for its answer "
                        "already, which is being made"
                    )
                found.followers += 1
            try:
                while not found.ready.wait(POLL_SECONDS):
                    if not wanted():
                        raise CancelledError("the client left")
            finally:
                with self._lock:
                    found.followers -= 1
            if found.message is not None:
                again(found.about)
                return cast(M, found.message)
        try:
            message, about = make()
        except BaseException:
            with self._lock:
                del self._answers[key]
            mine.ready.set()
            raise
        with self._lock:
            mine.message, mine.about = message, about
            mine.size, mine.time = message.ByteSize(), self._now()
            self._bytes += mine.size
            self._answers.move_to_end(key)
            self._forget()
        mine.ready.set()
        return message

    def _forget(self) -> None:
        """Under the lock: what is too old, and what is too much."""
        for key, answer in list(self._answers.items()):
            if answer.message is None:
                continue  # still being made
            old = self._now() - answer.time > self._seconds
            if not old and self._bytes <= self._most:
                return
            del self._answers[key]
            self._bytes -= answer.size
