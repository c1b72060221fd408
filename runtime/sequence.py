"""One request while it is decoded: its plan, its tokens so far, its place in the plan.

Knows no backend and no other request; batch.py puts the waves of several sequences together. Of a
long clip it holds the frames that are being decoded and no others.

Legend: N positions of the volume, G of the frames that may be given, w of the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import Int
from nuwa.spec.plan import Plan
from nuwa.spec.sampling import Sampling

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Lane:
    """Where rows of a sequence run: a cache slot, a condition slot, and what of that they see.

    text_length entries from text_first on are the lane's text; visual: i32 [N, v], the entries of
    the visual volume that each position sees, in raster order, or None if it sees none (see
    spec/conditions.py); guided: the logits of these rows are moved away from those of the
    sequence's next lane.
    """

    cache_slot: int
    condition_slot: int
    text_length: int
    text_first: int = 0
    visual: Int | None = None
    guided: bool = False


class Sequence:
    """A volume of tokens that is being decoded.

    draw: positions -> f32, their uniform numbers; tokens: i32 [G + 1], of the first frames in
    raster order, <bos> last; known: bool [G], those that are given and never overwritten.
    `call` has the rows that the next call decodes.
    """

    def __init__(
        self,
        plan: Plan,
        lanes: tuple[Lane, ...],
        sampling: Sampling,
        draw: Callable[[Int], Float],
        tokens: Int,
        known: npt.NDArray[np.bool_],
    ) -> None:
        self.plan, self.lanes, self.sampling = plan, lanes, sampling
        self._draw, self._given, self._known = draw, tokens[:-1], known
        self._step = 0
        self.positions_done = 0
        self.call = plan.call(0)
        # A ring of frames: position p is at p modulo its size.
        held, self._cells = plan.held_frames, plan.grid.height * plan.grid.width
        self._size = held * self._cells
        self._rolls = held < plan.grid.frames
        self._tokens = np.zeros(self._size + 1, np.int32)
        self._tokens[-1] = tokens[-1]
        self._uniform = np.empty(self._size, np.float32)
        self._free = np.ones(self._size, bool) if known.any() else None
        self._complete = 0
        self._begun = 0
        self._begin(held)

    @property
    def width(self) -> int:
        """w, how many positions the next call decodes."""
        return len(self.call.position)

    @property
    def done(self) -> bool:
        """Whether every position is decoded."""
        return self._step == self.plan.steps

    def fed(self) -> Int:
        """i32 [w]: the tokens fed to the positions of the next call."""
        fed = self.call.fed
        if self._rolls:
            fed = np.where(fed == self.plan.grid.size, self._size, fed % self._size)
        return self._tokens[fed]

    def uniform(self) -> Float:
        """f32 [w]: the draws of the positions of the next call."""
        return self._uniform[self._place()]

    def accept(self, drawn: Int) -> tuple[tuple[int, Int], ...]:
        """Takes the i32 [w] tokens of one call; (index, tokens [h, w]) of frames it completed.

        Frames are announced in index order, even should a later one be complete first.
        """
        place = self._place()
        if self._free is None:
            self._tokens[place] = drawn
        else:
            free = self._free[place]
            self._tokens[place[free]] = drawn[free]
        self.positions_done += self.width
        complete, before = self.plan.complete_frames(self._step), self._complete
        finished = tuple((frame, self._frame(frame)) for frame in range(before, complete))
        self._complete = complete
        self._step += 1
        if not self.done:
            self.call = self.plan.call(self._step)
            if self._rolls:
                self._begin(int(self.call.position.max()) // self._cells + 1)
        return finished

    def _place(self) -> Int:
        """i32 [w]: where the positions of the next call are held."""
        position = self.call.position
        return position % self._size if self._rolls else position

    def _frame(self, index: int) -> Int:
        grid = self.plan.grid
        start = index * self._cells % self._size
        frame = self._tokens[start : start + self._cells]
        return frame.reshape(grid.height, grid.width).copy()

    def _begin(self, frames: int) -> None:
        """Makes the frames up to number `frames` ready, in the place of those long complete."""
        if frames <= self._begun:
            return
        position = np.arange(self._begun * self._cells, frames * self._cells, dtype=np.int32)
        place = position % self._size
        self._uniform[place] = self._draw(position)
        if self._free is not None:
            self._free[place] = True
            given = np.flatnonzero(self._known[position[0] : position[-1] + 1])
            self._free[place[given]] = False
            self._tokens[place[given]] = self._given[position[given]]
        self._begun = frames
