"""Two runs of `nuwa bench` that take turns, round by round, and so see the same machine.

What a machine does in one minute differs from what it does in the next by more than two builds may.
Two runs one after the other compare these minutes, too; of two that take turns each round has one
of the other right beside it, and those pairs are compared (compare.py).

One run leads: it starts the other as a process of its own, which does a round when it is told to.
They talk over two pipes, a byte each time. Posix only, as the other one inherits the pipes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .statistics import signed_rank_needed

if TYPE_CHECKING:
    from .scenarios import Extent

READY, GO, DONE, OVER = b"r", b"g", b"d", b"o"


class Turns:
    """Of a run alone: it is always its turn. id: what both results of a pair have in common, None
    alone; waited: seconds until now in which it was not its turn.
    """

    id: str | None = None

    def __init__(self) -> None:
        self.waited = 0.0

    def begin(self) -> None:
        """Warmed up, and about to begin."""

    def rounds(self, extent: Extent) -> Iterator[Extent]:
        """The rounds of the extent, each when it is its turn; over when the next is asked for."""
        yield from extent.each()

    def finish(self) -> None:
        """Measured: nothing but this is done until the other one is, too."""

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - began


class Leading(Turns):
    """Of the run that starts the other one. Each round comes right after one of the other run, as
    what it finds in caches is the other's then, for both. In the second half of the pairs the other
    one's round comes first, so that neither has more of what slowly changes.

    command: given the other's `word`, which it makes a Following of, the command that starts it.
    """

    def __init__(self, command: Callable[[str], Sequence[str]]) -> None:
        super().__init__()
        self.id = uuid.uuid4().hex
        self._command, self._lost = command, False
        self._process: subprocess.Popen[bytes] | None = None
        self._heard, self._told = -1, -1

    def begin(self) -> None:
        """Starts the other one and waits until it has warmed up, too. ValueError if it ends."""
        heard, tell = os.pipe()
        hear, told = os.pipe()
        self._heard, self._told = heard, told
        try:
            self._process = subprocess.Popen(
                self._command(f"{hear}:{tell}:{self.id}"),
                stdout=subprocess.DEVNULL,
                pass_fds=(hear, tell),
            )
        finally:
            os.close(hear)
            os.close(tell)
        if not self._hears(READY):
            raise ValueError("the other run (--against) ended before it began; it said why")

    def rounds(self, extent: Extent) -> Iterator[Extent]:
        """Fewer where requests take longer than rounds and all of the time is over; but as many as
        a comparison needs, and all where so many queries were asked for.
        """
        began = time.perf_counter() - self.waited
        for index, each in enumerate(_rounds(extent)):
            own = time.perf_counter() - self.waited - began
            if index >= signed_rank_needed() and extent.least <= 1 and own > extent.seconds:
                break
            other_first = index >= extent.rounds // 2
            if other_first:
                self._others()
            yield each
            if not other_first:
                self._others()
        self._tell(OVER)

    def end(self) -> None:
        """Lets the other one write its result, and waits for that."""
        for pipe in (self._heard, self._told):
            if pipe >= 0:
                os.close(pipe)
        self._heard = self._told = -1
        if self._process is not None:
            self._process.wait()

    def _others(self) -> None:
        """If it is gone, this run goes on alone: what was measured is not thrown away."""
        if self._lost:
            return
        with self._waiting():
            self._tell(GO)
            self._lost = not self._hears(DONE)

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._told, word)

    def _hears(self, word: bytes) -> bool:
        return os.read(self._heard, 1) == word


class Following(Turns):
    """Of the run that was started. word: as Leading gave it; ValueError if it is none."""

    def __init__(self, word: str) -> None:
        super().__init__()
        try:
            hear, tell, self.id = word.split(":")
            self._hear, self._tell = int(hear), int(tell)
        except ValueError:
            raise ValueError(f"turns {word!r}: not what --against gives to the other run") from None

    def begin(self) -> None:
        self._say(READY)

    def rounds(self, extent: Extent) -> Iterator[Extent]:
        """As many as the leading run has."""
        for each in _rounds(extent):
            with self._waiting():
                word = os.read(self._hear, 1)
            if word == OVER:
                return
            if word != GO:
                raise KeyboardInterrupt  # who leads was interrupted: what there is is the result
            yield each
            self._say(DONE)

    def finish(self) -> None:
        """The leading one may have the last round; if it wants one of this run, there is none."""
        while word := os.read(self._hear, 1):
            if word == GO:
                os.close(self._tell)
                return

    def _say(self, word: bytes) -> None:
        try:
            os.write(self._tell, word)
        except BrokenPipeError:
            raise KeyboardInterrupt from None


def _rounds(extent: Extent) -> Iterator[Extent]:
    """Those in which something may be asked."""
    return (each for each in extent.each() if each.most != 0)
