"""TI2I and TV2V: the sprite is hidden by a box, and a new caption changes one thing about it.

The box covers all places of the sprite in what is given. For half of the questions it is made of
whole 8-pixel cells, with at least a pixel to spare; for the other half it has 1 to 3 pixels to
spare on each side, so that tokens are partly hidden and there are seams: joint_off_cells is of
those alone. The edit is drawn among colour and class, for clips also motion: the mirrored one
("left" for "right"), which runs along the same stretch and so fits into the box. An edit that
would lead out of the split (a class-motion pair that it does not have) gives way to the next one.
The background lies mostly outside the box, so it is never edited.

Shapes: S = 64.
"""

from __future__ import annotations

import numpy as np

from ..judge import Verdict
from ..sprites.edits import EDITS, aligned, edited, tile_box
from ..sprites.world import FRAMES, SIDE, SpriteSample, SpriteWorld
from .bars import Bar
from .question import Part, Question, drawn
from .scoring import Score

CELL = 8  # pixels of a token of the sprite models
MOST_SPARE = 3  # pixels between the sprite's places and a box that is not made of whole cells

Box = tuple[int, int, int, int]  # top, left, bottom, right, ends excluded


class Manipulation(Part):
    def __init__(self, world: SpriteWorld, task: str) -> None:
        super().__init__(world)
        self.name = self.task = task
        clip = task == "tv2v"
        self.factors = ("class", "colour", "background") + (("motion",) if clip else ())
        self.edits = EDITS if clip else ("colour", "class")
        self.asks = (
            f"{'a clip' if clip else 'a picture'} whose sprite is hidden by a box over all its "
            f"places, and a caption with another {' or '.join(self.edits)}; kept_X: what the "
            "caption leaves as it was is right"
        )

    @property
    def bars(self) -> tuple[Bar, ...]:
        edited_bars = (Bar(f"edited_{factor}", 0.90, "value") for factor in self.edits)
        kept_bars = (Bar(f"kept_{factor}", 0.95) for factor in self.factors)
        return (*edited_bars, *kept_bars, Bar("known_identical", kind="every"))

    def question(self, index: int) -> Question:
        given, (factor, wanted) = self.world.sample(index), self._edit(index)
        at = range(FRAMES) if self.task == "tv2v" else range(index % FRAMES, index % FRAMES + 1)
        top, left, bottom, right = self._box(index, at)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[top:bottom, left:right] = True
        frames = slice(at.start, at.stop)
        # What is hidden is wiped, so it cannot help by mistake.
        shown = np.where(mask[..., None], np.uint8(0), given.frames[frames])
        return Question(
            wanted.frames[frames],
            wanted.factors,
            wanted.video_caption if self.task == "tv2v" else wanted.image_caption,
            frames=shown,
            mask=mask,
            edited=factor,
        )

    def scores(self, question: Question, clip: np.ndarray, verdict: Verdict) -> dict[str, Score]:
        assert question.mask is not None, "this part asks with a mask"
        right = {k: float(v) for k, v in self.right(question, verdict).items()}
        edited_factor = str(question.edited)
        scores: dict[str, Score] = {"edited": right[edited_factor]}
        scores[f"edited_{edited_factor}"] = right[edited_factor]
        scores |= {f"kept_{name}": right[name] for name in self.factors if name != edited_factor}
        scores["joint"] = right["joint"]
        if not in_whole_cells(question.mask):
            scores["joint_off_cells"] = right["joint"]
        return scores | {"known_identical": float(question.known_identical(clip))}

    def _edit(self, index: int) -> tuple[str, SpriteSample]:
        turn = self._drawn("edit", index, len(self.edits))
        for factor in self.edits[turn:] + self.edits[:turn]:
            sample = edited(self.world, index, factor)
            if sample is not None:
                return factor, sample
        raise AssertionError("there is always another colour")

    def _box(self, index: int, at: range) -> Box:
        places = tile_box(self.world, index, at)
        if self._drawn("cells", index, 2):
            return aligned(places, CELL)
        top, left, bottom, right = places
        spare = [1 + self._drawn(f"spare{side}", index, MOST_SPARE) for side in range(4)]
        return (
            max(top - spare[0], 0),
            max(left - spare[1], 0),
            min(bottom + spare[2], SIDE),
            min(right + spare[3], SIDE),
        )

    def _drawn(self, what: str, index: int, choices: int) -> int:
        return drawn(f"{what}/{self.world.split}/{index}", choices)


def in_whole_cells(mask_SS: np.ndarray) -> bool:
    """Every cell of bool[S,S] is hidden as a whole or not at all."""
    count = SIDE // CELL
    hidden = mask_SS.reshape(count, CELL, count, CELL).sum((1, 3))
    return bool(np.isin(hidden, (0, CELL * CELL)).all())
