"""Requests with samples that wait for a slot: whose turn it is to be prepared, and to be admitted.

Knows no thread and has no lock; the scheduler changes and reads it under its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from .submission import Submission


class Waiting:
    """In the order in which they get a slot. preparing: the one that the engine encodes now.

    Fair among clients by start-time fair queueing (Goyal, Vin and Cheng, 1996): each has its turn
    for as many frames as any other; requests of one client stay in the order they came in.
    """

    def __init__(self) -> None:
        self._order: list[tuple[float, int, Submission]] = []  # by start tag
        self._count = 0
        self._now = 0.0  # start tag of the last one that was taken
        self._finish: dict[str, float] = {}  # by client: finish tag of its last one
        self.preparing: Submission | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Submission]:
        """Over those that wait now, so that they may be removed meanwhile."""
        return iter([submission for _, _, submission in self._order])

    def __contains__(self, submission: Submission) -> bool:
        return any(each is submission for _, _, each in self._order)

    def append(self, submission: Submission) -> None:
        """For the next sample of it."""
        start = self._start(submission.client)
        self._count += 1
        bisect.insort(self._order, (start, self._count, submission))
        self._finish[submission.client] = start + submission.handle.request.frame_count

    def take(self, submission: Submission) -> None:
        """Removes one that gets a slot now."""
        start = next((tag for tag, _, each in self._order if each is submission), self._now)
        self._now = max(self._now, start)
        self._finish = {who: tag for who, tag in self._finish.items() if tag > self._now}
        self._drop(submission)

    def remove(self, submission: Submission) -> None:
        """One that ends without a slot for its next sample. Harmless if it does not wait."""
        tag = next((tag for tag, _, each in self._order if each is submission), None)
        if tag is None:
            return
        self._drop(submission)
        if self._order:  # its client is charged with no more than it still waits for
            client = submission.client
            ends = [
                t + e.handle.request.frame_count for t, _, e in self._order if e.client == client
            ]
            self._finish[client] = max(ends, default=tag)

    def _drop(self, submission: Submission) -> None:
        self._order = [entry for entry in self._order if entry[2] is not submission]
        if not self._order:  # nobody waits for anybody: all begin anew
            self._now = max(self._now, *self._finish.values(), 0.0)
            self._finish = {}

    def of(self, client: str) -> int:
        """How many of this client wait."""
        return sum(submission.client == client for _, _, submission in self._order)

    def before(self, client: str) -> list[Submission]:
        """Those of which a sample is to get a slot before a new request of this client."""
        start = self._start(client)
        return [each for tag, _, each in self._order if tag <= start]

    def _start(self, client: str) -> float:
        return max(self._now, self._finish.get(client, 0.0))

    def ready(self) -> Submission | None:
        """The first that is prepared, and whose reader keeps up."""
        return next((each for each in self if each.prepared is not None and each.read), None)

    def unprepared(self) -> Submission | None:
        """The first that is not prepared, nor being so, and whose reader keeps up."""
        for each in self:
            if each.prepared is None and each is not self.preparing and each.read:
                return each
        return None

    def idle(self) -> Submission | None:
        """The last one that is prepared, not running, and behind one that is not prepared, or
        behind its reader.

        It has had a sample of its own, or was overtaken by a client whose turn is sooner: then what
        was prepared of it is made again.
        """
        found, waiting = None, self.unprepared()
        behind = False
        for each in self:
            behind = behind or each is waiting
            if each.prepared is not None and not each.running and (behind or not each.read):
                found = each
        return found
