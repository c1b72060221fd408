"""Requests with samples that wait for a slot: whose turn it is to be prepared, and to be admitted.

Knows no thread and has no lock; the scheduler changes and reads it under its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from .submission import Submission


class Waiting:
    """In the order in which they get a slot. preparing: the one that the engine encodes now."""

    def __init__(self) -> None:
        self._order: dict[Submission, None] = {}  # a set that keeps the order
        self.preparing: Submission | None = None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Submission]:
        """Over those that wait now, so that they may be removed meanwhile."""
        return iter(list(self._order))

    def __contains__(self, submission: Submission) -> bool:
        return submission in self._order

    def append(self, submission: Submission) -> None:
        """At the end."""
        self._order[submission] = None

    def remove(self, submission: Submission) -> None:
        """Harmless if it does not wait."""
        self._order.pop(submission, None)

    def ready(self) -> Submission | None:
        """The first that is prepared."""
        return next((each for each in self._order if each.prepared is not None), None)

    def unprepared(self) -> Submission | None:
        """The first that is not prepared, nor being so."""
        for each in self._order:
            if each.prepared is None and each is not self.preparing:
                return each
        return None

    def idle(self) -> Submission | None:
        """The last one that is prepared, not running, and behind one that is not prepared.

        It has had a sample of its own, or it would not be behind.
        """
        found, waiting = None, self.unprepared()
        behind = False
        for each in self._order:
            behind = behind or each is waiting
            if behind and each.prepared is not None and not each.running:
                found = each
        return found
