"""One request while it is decoded: its plan, its place in the plan, the rows that are next.

Knows no backend and no other request. Its tokens are with the backend; of a long clip those of the
frames that are being decoded and no others.

Legend: N positions of the volume, G of the frames that may be given, w of a call, v columns of the
visual window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import MASKED, Int
from nuwa.spec.plan import Plan
from nuwa.spec.sampling import Sampling

from .backends.base import Lane, Part, Rows, Stream

Float = npt.NDArray[np.float32]


class Sequence:
    """A volume of tokens that is being decoded.

    draw: positions -> f32, their uniform numbers; given: i32 [G], tokens of the first frames in
    raster order, of which bool [G] `known` count and are never drawn; bos: the token that the first
    position is fed; visual: i32 [N, v], the entries of the visual volume that each position sees,
    or None if it sees none.

    stream: as the backend sees it; it has the rows of the calls that are next. width: w, how many
    positions are left of the call that is next, or under way; ordinary: whether that call is as
    others are, not many of them merged; done: whether every position is decoded. Only
    `advance` and `restage` change that, once a step, so these are plain attributes; between the two
    width may be 0 though more calls follow.
    """

    def __init__(
        self,
        plan: Plan,
        lanes: tuple[Lane, ...],
        sampling: Sampling,
        draw: Callable[[Int], Float],
        given: Int,
        known: npt.NDArray[np.bool_],
        bos: int,
        visual: Int | None = None,
    ) -> None:
        self.plan = plan
        self._draw, self._visual, self._bos = draw, visual, bos
        # Of any position: its token, or MASKED. One more for those that are beyond the given ones.
        self._given = np.append(np.where(known, given, MASKED), MASKED).astype(np.int32)
        self._cells = plan.grid.height * plan.grid.width
        self._held = plan.held_frames * self._cells  # a ring: position p is at p modulo its size
        self._steps, self._widest = plan.steps, plan.widest
        self._step = self._row = 0
        self._complete = 0
        self.positions_done, self.positions_total = 0, plan.grid.size
        self.done = self._steps == 0
        self.stream = Stream(lanes, sampling, self._held, self._stage())

    def part(self, most: int | None = None) -> Part:
        """The rows that are next: of one call, all that are left of it or at most `most`.

        A call may be decoded bit by bit: no row reads what a later one of it writes.
        """
        return Part(self.stream, self._row, self.width if most is None else min(most, self.width))

    def ahead(self, most: int) -> list[Part]:
        """The rows of up to `most` calls, for a step of several, if the next one is a wave.

        All of them but the last are waves that complete no frame, and all are staged.
        """
        parts, first = [], self._row
        ends, complete = reversed(self._ends), reversed(self._completes)
        for end, frames in itertools.islice(zip(ends, complete, strict=True), most):
            if end - first > self._widest:
                break
            parts.append(Part(self.stream, first, end - first))
            first = end
            if frames > self._complete:
                break
        return parts

    def advance(self, count: int) -> range:
        """Takes note that so many rows are decoded; the frames that are complete by them.

        Frames are announced in index order, even should a later one be complete first.
        """
        self._row += count
        self.positions_done += count
        before = self._complete
        if self._row == self._ends[-1]:
            self._complete = self._completes.pop()
            self._step += 1
            self._ends.pop()
            self.done = self._step == self._steps
        self._look()
        return range(before, self._complete)

    def restage(self) -> bool:
        """Gives the stream new rows if it is through with those it has; whether it was."""
        if self.done or self._ends:
            return False
        self.stream.rows = self._stage()
        return True

    def decoded(self) -> npt.NDArray[np.bool_]:
        """bool [N]: which positions of an image are decoded; all its rows are staged at once."""
        assert self.plan.grid.frames == 1, "of a clip, frames are told when they are complete"
        done = np.zeros(self._cells, bool)
        done[self.stream.rows.place[: self._row]] = True
        return done

    def place(self, frame: int) -> tuple[int, int]:
        """Where a complete frame's tokens are held: the first place, and how many."""
        return frame * self._cells % self._held, self._cells

    def _look(self) -> None:
        self.width = self._ends[-1] - self._row if self._ends else 0
        self.ordinary = self.width <= self._widest

    def _stage(self) -> Rows:
        call, bounds = self.plan.stage(self._step)
        # Of each staged call, that of the one under way last: where its rows end, and how many
        # frames are complete when it is done.
        self._row, self._ends = 0, bounds[:0:-1].tolist()
        staged = range(self._step, self._step + len(self._ends))
        self._completes = [self.plan.complete_frames(step) for step in reversed(staged)]
        self._look()
        first = call.fed == self.plan.grid.size
        known = np.where(first, self._bos, self._known(call.fed))
        held = call.fed % self._held
        return Rows(
            coordinates=np.ascontiguousarray(call.coordinates),
            fed=np.where(known == MASKED, held, -1 - known).astype(np.int32),
            place=call.position % np.int32(self._held),
            given=self._known(call.position),
            write_index=np.ascontiguousarray(call.write_index),
            neighbours=np.ascontiguousarray(call.neighbours),
            visual=None if self._visual is None else self._visual[call.position],
            uniform=self._draw(call.position),
        )

    def _known(self, position: Int) -> Int:
        """i32 [w]: tokens of positions, MASKED where they are drawn."""
        return self._given[np.minimum(position, len(self._given) - 1)]
