"""T2I and T2V: a caption, and everything that it says must be there."""

from __future__ import annotations

from ..sprites.world import FRAMES, SpriteWorld
from .bars import Bar
from .question import Part, Question


class FromText(Part):
    def __init__(self, world: SpriteWorld, task: str) -> None:
        super().__init__(world)
        self.name = self.task = task
        self.factors = ("class", "colour", "background")
        self.asks = "an image of the caption; joint: class, colour and background are right"
        if task == "t2v":
            self.factors += ("motion",)
            self.asks = "a clip of the caption; joint: class, colour, background, motion are right"

    @property
    def bars(self) -> tuple[Bar, ...]:
        return (Bar("joint", 0.80 if self.world.split == "novel" else 0.95),)

    def question(self, index: int) -> Question:
        sample = self.world.sample(index)
        if self.task == "t2v":
            return Question(sample.frames, sample.factors, sample.video_caption)
        frame = index % FRAMES
        return Question(sample.frames[frame][None], sample.factors, sample.image_caption)
