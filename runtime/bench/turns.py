"""Two runs of `nuwa bench` that take turns, round by round, and so see the same machine.

What a machine does in one minute differs from what it does in the next by more than two builds may.
Two runs one after the other compare these minutes, too; of two that take turns each round has one
of the other right beside it, and those pairs are compared (compare.py).

Both are processes of their own, alike but for what they measure, and a third one, which measures
nothing, tells each when it is its turn: over two pipes, a byte each time. Posix only, as they
inherit the pipes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

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


class Following(Turns):
    """Of a run that is told when. word: as Run gave it; ValueError if it is none."""

    def __init__(self, word: str) -> None:
        super().__init__()
        try:
            hear, tell, self.id = word.split(":")
            self._hear, self._tell = int(hear), int(tell)
        except ValueError:
            raise ValueError(f"turns {word!r}: not what --against gives to its runs") from None

    def begin(self) -> None:
        self._say(READY)

    def rounds(self, extent: Extent) -> Iterator[Extent]:
        """As many as it is told to do."""
        for each in _rounds(extent):
            with self._waiting():
                word = os.read(self._hear, 1)
            if word == OVER:
                return
            if word != GO:
                raise KeyboardInterrupt  # who tells it was interrupted: what there is is the result
            yield each
            self._say(DONE)

    def finish(self) -> None:
        """The other one may have the last round; one more of this run there is not."""
        while word := os.read(self._hear, 1):
            if word == GO:
                os.close(self._tell)
                return

    def _say(self, word: bytes) -> None:
        try:
            os.write(self._tell, word)
        except BrokenPipeError:
            raise KeyboardInterrupt from None


class Run:
    """One of the two, as who leads them sees it: starts it, and stops it at last.

    command: given its `word`, which it makes a Following of, the command that starts it; said: what
    it says on stderr is written there.
    """

    def __init__(self, command: Callable[[str], Sequence[str]], id: str, said: IO[str]) -> None:
        heard, tell = os.pipe()
        hear, told = os.pipe()
        self._heard, self._told = heard, told
        try:
            self._process = subprocess.Popen(
                command(f"{hear}:{tell}:{id}"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=(hear, tell),
            )
        except BaseException:
            self._close()
            raise
        finally:
            os.close(hear)
            os.close(tell)

    def warmed(self) -> bool:
        """Waits until it has warmed up; False if it ended before."""
        return self._hears(READY)

    def round(self) -> bool:
        """Has it do a round; False if it did not, as it is over."""
        self._tell(GO)
        return self._hears(DONE)

    def over(self) -> None:
        """Tells it that it has had its rounds."""
        self._tell(OVER)

    def end(self) -> int:
        """Waits until it has written its result, and ended; its exit status."""
        self._close()
        return self._process.wait()

    def kill(self) -> None:
        """If it has not ended."""
        self._close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _close(self) -> None:
        for pipe in (self._heard, self._told):
            if pipe >= 0:
                os.close(pipe)
        self._heard = self._told = -1

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._told, word)

    def _hears(self, word: bytes) -> bool:
        return os.read(self._heard, 1) == word


def take_turns(extent: Extent, runs: Sequence[Run]) -> int:
    """Has two runs do their rounds of the extent, and says how many pairs there were.

    Each round comes right after one of the other run, as what it finds in caches is the other's
    then, for both; but for one, where who goes first changes. The first run goes first in the first
    half of the pairs, the other one in the second, so that neither has more of what slowly changes.

    Rounds are fewer where requests take longer than rounds and all of the time is over; but as many
    as a comparison needs, and all where so many queries were asked for. A run that is over ends it.
    Where the time will end it, the half is that of the time, or of the pairs that are needed.
    """
    pairs, taken, order = 0, 0.0, runs
    least, timed = signed_rank_needed(), extent.least <= 1
    for index, _ in enumerate(_rounds(extent)):
        if timed and index >= least and taken > 2 * extent.seconds:
            break
        half = timed and index >= least // 2 and taken > extent.seconds
        if half or index >= extent.rounds // 2:
            order = runs[::-1]
        began = time.perf_counter()
        if not all(run.round() for run in order):
            break
        taken += time.perf_counter() - began
        pairs += 1
    for run in runs:
        run.over()
    return pairs


def _rounds(extent: Extent) -> Iterator[Extent]:
    """Those in which something may be asked."""
    return (each for each in extent.each() if each.most != 0)
