"""Calls that wait for their client, to send its request or to take an answer: not for ever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from .logs import fields

log = logging.getLogger("nuwa.runtime")


@dataclass(eq=False)
class _Wait:
    """what: the call, and what it waits for; until: when patience ends; for_request: whether the
    client is to send the request.
    """

    context: grpc.ServicerContext
    what: str
    began: float
    until: float
    for_request: bool


class Patience:
    """Safe to use from any thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._waits: set[_Wait] = set()
        self._choosing = threading.Lock()

    @contextmanager
    def waiting(
        self,
        context: grpc.ServicerContext,
        what: str,
        seconds: float,
        *,
        for_request: bool = False,
    ) -> Iterator[None]:
        """Around what only the client can end."""
        now = self._now()
        wait = _Wait(context, what, now, now + seconds, for_request)
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
                self._end(wait)

    def make_room(self, calls: Container[grpc.ServicerContext], seconds: float) -> bool:
        """Cancels the one of these calls that has waited longest for its request, if for `seconds`
        at least; whether there was one. No call is cancelled twice.
        """
        before = self._now() - seconds
        with self._choosing:
            silent = [
                wait
                for wait in list(self._waits)
                if wait.for_request and wait.began <= before and wait.context in calls
            ]
            if not silent:
                return False
            self._end(min(silent, key=lambda wait: wait.began))
        return True

    def _end(self, wait: _Wait) -> None:
        self._waits.discard(wait)
        # The call's thread is within gRPC, which lets go of it only when the call has ended: too
        # late for a status of ours, so that it is told here alone who was too slow.
        peer = wait.context.peer()
        log.warning("%s: cancelled, of %s", wait.what, peer, extra=fields(peer=peer))
        wait.context.cancel()
