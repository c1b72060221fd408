"""I2I: half of a picture is hidden and is to be made up, without a word about it.

The hidden half is one of those (upper, lower, left, right) that leave at least half of the
sprite's pixels visible, so that the class can mostly be told; there always is one. What the judge
makes of that half alone is the baseline "visible": to be as good as it, nothing need be painted.

Shapes: S = 64.
"""

from __future__ import annotations

import numpy as np

from ..judge import Verdict
from ..readers import median_colour
from ..sprites.world import FRAMES, SIDE
from .bars import Bar
from .question import Part, Question, drawn
from .scoring import Score

HALVES = (
    (slice(0, SIDE // 2), slice(None)),
    (slice(SIDE // 2, SIDE), slice(None)),
    (slice(None), slice(0, SIDE // 2)),
    (slice(None), slice(SIDE // 2, SIDE)),
)
LEAST_VISIBLE = 0.5  # of the sprite's pixels
CUT = 0.25  # hidden share of the sprite from which on it counts as cut


class Completion(Part):
    name = task = "i2i"
    asks = (
        "the hidden half (upper, lower, left or right, drawn among those that leave at least half "
        "of the sprite's pixels visible) of a picture, without a prompt; class_cut counts only "
        "the pictures with at least a quarter of the sprite hidden"
    )
    factors = ("class", "colour", "background")

    @property
    def bars(self) -> tuple[Bar, ...]:
        return (
            Bar("class", 0.90),
            Bar("class", kind="baseline", against="visible"),
            Bar("known_identical", kind="every"),
        )

    def question(self, index: int) -> Question:
        sample, frame = self.world.sample(index), index % FRAMES
        real = sample.frames[frame][None]
        mask = _half(real[0], f"half/{self.world.split}/{index}")
        # What is hidden is wiped, so it cannot help by mistake.
        given = np.where(mask[..., None], np.uint8(0), real)
        return Question(real, sample.factors, frames=given, mask=mask)

    def scores(self, question: Question, clip: np.ndarray, verdict: Verdict) -> dict[str, Score]:
        assert question.mask is not None, "this part asks with a mask"
        scores = super().scores(question, clip, verdict)
        if hidden_share(question.real[0], question.mask) >= CUT:
            scores["class_cut"] = scores["class"]
        return scores | {"known_identical": float(question.known_identical(clip))}

    def baselines(self, question: Question) -> dict[str, np.ndarray]:
        """visible: the picture with plain background in its hidden half."""
        assert question.mask is not None, "this part asks with a mask"
        plain = _background(question.real[0])
        return {"visible": np.where(question.mask[..., None], plain, question.real)}


def hidden_share(picture: np.ndarray, mask_SS: np.ndarray) -> float:
    """Share of the sprite's pixels of a real picture u8[S,S,3] that lie inside the mask."""
    sprite_SS = (picture != _background(picture)).any(-1)
    return float((sprite_SS & mask_SS).sum() / max(sprite_SS.sum(), 1))


def _half(picture: np.ndarray, name: str) -> np.ndarray:
    """bool[S,S], True in one of the halves that may be hidden; `name` draws which."""
    masks = np.zeros((len(HALVES), SIDE, SIDE), bool)
    for mask, half in zip(masks, HALVES, strict=True):
        mask[half] = True
    fit = [mask for mask in masks if hidden_share(picture, mask) <= 1 - LEAST_VISIBLE]
    return fit[drawn(name, len(fit))]


def _background(picture: np.ndarray) -> np.ndarray:
    return median_colour(picture).astype(np.uint8)
