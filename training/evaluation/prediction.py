"""V2V: a clip goes on from its first frames, two unless it is said.

Two frames tell what the sprite is and where it goes. Whether it will turn they tell in part: at
level digits a clip that does not turn runs over nearly all of the canvas, so it starts within 4
pixels of the end from which it comes, and most clips that turn start elsewhere. So clips of one-way
motion are compared pixel by pixel without a caption too. The captioned part is a supplement, where
the caption says that the motion is one-way and the answer is wholly determined.
"""

from __future__ import annotations

import numpy as np

from ..judge import Verdict
from ..metrics import ssim
from ..readers import locate, read_motion
from ..sprites.world import DIRECTIONS, FRAMES, SpriteWorld
from .bars import Bar
from .quality import capped_psnr
from .question import Part, Question
from .scoring import Score

GIVEN = 2


class Prediction(Part):
    """Without a prompt, on all motions. given: frames, in [1, FRAMES - 1]."""

    name = task = "v2v"
    factors = ("class", "colour", "background")
    whole = "identity"

    def __init__(self, world: SpriteWorld, given: int = GIVEN) -> None:
        super().__init__(world)
        if not 1 <= given < FRAMES:
            raise ValueError(f"given {given} is not in [1, {FRAMES - 1}]")
        self.given = given
        self.asks = (
            f"a clip from its first {_frames(given)}, without a prompt; identity: class, colour "
            "and background of the predicted frames are right; psnr_one_way and ssim_one_way: of "
            "the clips that do not turn, which only the place where the sprite starts tells"
        )

    @property
    def bars(self) -> tuple[Bar, ...]:
        """One frame does not tell where a sprite goes."""
        identity = Bar("identity", 0.95)
        return (identity, Bar("psnr_one_way", 2.0, "decibels")) if self.given > 1 else (identity,)

    def question(self, index: int) -> Question:
        sample = self.world.sample(index)
        return Question(sample.frames, sample.factors, frames=sample.frames[: self.given])

    def judged(self, clip: np.ndarray) -> np.ndarray:
        return clip[self.given :]

    def scores(self, question: Question, clip: np.ndarray, verdict: Verdict) -> dict[str, Score]:
        scores = super().scores(question, clip, verdict)
        motion = read_motion(locate(clip).track_F2)
        scores["motion"] = float(motion == question.expected.motion)
        if question.expected.motion in DIRECTIONS:
            scores |= self._quality(self.judged(clip), self.judged(question.real))
        return scores | {"known_identical": float(question.known_identical(clip))}

    def _quality(self, made: np.ndarray, real: np.ndarray) -> dict[str, float]:
        return {"psnr_one_way": capped_psnr(made, real), "ssim_one_way": ssim(made, real)}


class CaptionedPrediction(Prediction):
    """With the caption, on the samples whose motion is one-way: `question(i)` is on the i-th."""

    name = "v2v_captioned"

    def __init__(self, world: SpriteWorld, given: int = GIVEN) -> None:
        super().__init__(world, given)
        self.asks = f"a clip of one-way motion from its first {_frames(given)} and its caption"
        self._one_way: list[int] = []

    @property
    def bars(self) -> tuple[Bar, ...]:
        return (Bar("identity", 0.95), Bar("psnr", 2.0, "decibels"))

    def question(self, index: int) -> Question:
        sample = self.world.sample(self._sample_index(index))
        frames = sample.frames
        return Question(frames, sample.factors, sample.video_caption, frames=frames[: self.given])

    def _quality(self, made: np.ndarray, real: np.ndarray) -> dict[str, float]:
        return {"psnr": capped_psnr(made, real), "ssim": ssim(made, real)}

    def _sample_index(self, index: int) -> int:
        while len(self._one_way) <= index:
            candidate = self._one_way[-1] + 1 if self._one_way else 0
            while self.world.factors(candidate).motion not in DIRECTIONS:
                candidate += 1
            self._one_way.append(candidate)
        return self._one_way[index]


def _frames(count: int) -> str:
    return "frame" if count == 1 else f"{count} frames"
