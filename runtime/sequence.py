"""One request while it is decoded: its plan, its tokens so far, its place in the plan.

Knows no backend and no other request; batch.py puts the waves of several sequences together.

Legend: N positions of the volume, w positions of the current wave.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import Int
from nuwa.spec.plan import DecodePlan

from .core import Sampling


@dataclass(frozen=True)
class Lane:
    """Where rows of a sequence run: a cache slot, a condition slot, and how much text that holds.

    guided: the logits of these rows are moved away from those of the sequence's next lane.
    """

    cache_slot: int
    condition_slot: int
    text_length: int
    guided: bool = False


class Sequence:
    """A volume of tokens that is being decoded.

    uniform: f32 [N], one draw a position, in decoding order; tokens: i32 [N + 1], in raster order,
    <bos> last; known: bool [N] in raster order, tokens that are given and never overwritten.
    `rows` are those of the plan's tables that the next call decodes.
    """

    def __init__(
        self,
        plan: DecodePlan,
        lanes: tuple[Lane, ...],
        sampling: Sampling,
        uniform: npt.NDArray[np.float32],
        tokens: Int,
        known: npt.NDArray[np.bool_],
    ) -> None:
        self.plan, self.lanes, self.sampling = plan, lanes, sampling
        self.uniform, self.tokens = uniform, tokens
        self._free = None if not known.any() else ~known
        self._call = 0
        self.rows = plan.rows(0)
        # Frames are announced in index order, even should a later one be complete first.
        self._finishing = defaultdict(list)
        for frame, call in enumerate(np.maximum.accumulate(plan.frame_done).tolist()):
            self._finishing[call].append(frame)

    @property
    def width(self) -> int:
        """w, how many positions the next call decodes."""
        return self.rows.stop - self.rows.start

    @property
    def positions_done(self) -> int:
        """Positions decoded so far."""
        return self.plan.grid.size if self.done else self.rows.start

    @property
    def done(self) -> bool:
        """Whether every position is decoded."""
        return self._call == self.plan.steps

    def fed(self) -> Int:
        """i32 [w]: the tokens fed to the positions of the next call."""
        return self.tokens[self.plan.fed[self.rows]]

    def accept(self, drawn: Int) -> tuple[tuple[int, Int], ...]:
        """Takes the i32 [w] tokens of one call; (index, tokens [h, w]) of frames it completed."""
        position = self.plan.position[self.rows]
        if self._free is None:
            self.tokens[position] = drawn
        else:
            free = self._free[position]
            self.tokens[position[free]] = drawn[free]
        finished = self._finishing.get(self._call, ())
        self._call += 1
        if not self.done:
            self.rows = self.plan.rows(self._call)
        if not finished:
            return ()
        volume = self.tokens[:-1].reshape(self.plan.grid.shape)
        return tuple((frame, volume[frame].copy()) for frame in finished)
