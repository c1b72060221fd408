"""Calls that wait for their client, to send its request or to take an answer: not for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

log = logging.getLogger("nuwa.runtime")


@dataclass(eq=False)
class _Wait:
    """what: the call, and what it waits for; until: when patience ends."""

    context: grpc.ServicerContext
    what: str
    until: float


class Patience:
    """Safe to use from any thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._waits: set[_Wait] = set()

    @contextmanager
    def waiting(self, context: grpc.ServicerContext, what: str, seconds: float) -> Iterator[None]:
        """Around what only the client can end."""
        wait = _Wait(context, what, self._now() + seconds)
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)

    def look(self) -> None:
        """Cancels calls that have waited for longer than they may."""
        now = self._now()
        for wait in list(self._waits):
            if now > wait.until:
                self._waits.discard(wait)
                log.warning("%s: cancelled", wait.what)
                wait.context.cancel()
