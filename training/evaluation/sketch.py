"""S2I and S2V: the class maps of a real sample, and a picture or clip that has them.

The answer is segmented again, frame by frame: pixels of at least half ink are the sprite's, their
label is the class that the judge reads in that frame.

Shapes: F frames, S = 64, C classes with the background.
"""

from __future__ import annotations

import numpy as np

from ..judge import Verdict
from ..metrics import confusion, mean_iou_of, ssim
from ..sprites.world import CLASSES, FRAMES, SpriteWorld
from .bars import Bar
from .quality import capped_psnr
from .question import Part, Question
from .scoring import Score

PROMPTS = ("caption", "none")
INK = 0.5  # a pixel belongs to the sprite when at least half of it is ink, as in the class maps


class FromSketch(Part):
    """prompt: "caption" gives the sample's caption with the sketch, "none" nothing."""

    def __init__(self, world: SpriteWorld, task: str, prompt: str = "caption") -> None:
        super().__init__(world)
        if prompt not in PROMPTS:
            raise ValueError(f"sketch_prompt {prompt!r} is not one of {', '.join(PROMPTS)}")
        self.name = self.task = task
        self.captioned = prompt == "caption"
        # Without a caption nothing tells the colour or the background.
        self.factors = ("class", "colour", "background") if self.captioned else ("class",)
        if task == "s2v":
            self.factors += ("motion",)
        given = "class maps and the caption" if self.captioned else "class maps and no caption"
        self.asks = f"the {'clip' if task == 's2v' else 'image'} of a real sample's {given}"

    @property
    def bars(self) -> tuple[Bar, ...]:
        return (
            Bar("miou", 0.85, "value"),
            Bar("miou_sample", 0.85, "value"),
            Bar("class", 0.95),
        )

    def question(self, index: int) -> Question:
        sample = self.world.sample(index)
        frames = slice(None) if self.task == "s2v" else slice(index % FRAMES, index % FRAMES + 1)
        caption = sample.video_caption if self.task == "s2v" else sample.image_caption
        return Question(
            sample.frames[frames],
            sample.factors,
            caption if self.captioned else "",
            sketch=sample.segmentation[frames],
        )

    def scores(self, question: Question, clip: np.ndarray, verdict: Verdict) -> dict[str, Score]:
        """miou is of the pixels of all samples together, miou_sample the mean over samples."""
        assert question.sketch is not None, "a sketch part asks with a sketch"
        sprite_FSS = verdict.layout.ink_FSS >= INK
        labels_FSS = sprite_FSS * (verdict.classes_F + 1)[:, None, None]  # NO_CLASS: background
        pixels_CC = confusion(labels_FSS, question.sketch, len(CLASSES) + 1)
        scores = super().scores(question, clip, verdict) | {
            "miou": pixels_CC,
            "miou_sample": float(mean_iou_of(pixels_CC)),
            "sprite_iou": _iou(sprite_FSS, question.sketch > 0),
        }
        if self.captioned:
            scores |= {
                "psnr": capped_psnr(clip, question.real),
                "ssim": ssim(clip, question.real),
            }
        return scores


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of the pixels that are in either, the share that is in both."""
    return float((a & b).sum() / max((a | b).sum(), 1))
