"""The nouns of the evaluation: a question to a generator, and a part of the test.

A part is one way to test one task: it says what is asked and what is right. Knows no generator,
no model and no file.

Shapes: F frames, S = 64.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ..judge import Verdict
from ..sprites.world import Factors, SpriteWorld
from .bars import Bar
from .scoring import Score

LEAST_SEEN = 0.9  # share of the judged frames that must show a sprite: 9 of 10, all of 8


@dataclass(frozen=True)
class Question:
    """One request and a right answer to it. What the task does not take is None, or "".

    frames u8[F,S,S,3] are given; mask bool[S,S] is True where they are to be replaced; sketch
    u8[F,S,S] are class ids. edited: the factor in which the answer differs from what is given.
    """

    real: np.ndarray  # u8[F,S,S,3], a right answer
    expected: Factors
    prompt: str = ""
    frames: np.ndarray | None = None
    mask: np.ndarray | None = None
    sketch: np.ndarray | None = None
    edited: str | None = None

    @property
    def known(self) -> np.ndarray:
        """bool[F,S,S]: pixels that must come back as they were given."""
        known_FSS = np.zeros(self.real.shape[:3], bool)
        if self.frames is not None:
            known_FSS[: len(self.frames)] = True if self.mask is None else ~self.mask
        return known_FSS

    def restored(self, clip: np.ndarray) -> np.ndarray:
        """The clip with the known pixels as they are: a tokenizer alone would change them."""
        return np.where(self.known[..., None], self.real, clip)

    def known_identical(self, clip: np.ndarray) -> bool:
        known_FSS = self.known
        return bool((clip[known_FSS] == self.real[known_FSS]).all())


class Part(ABC):
    """One way to test one task.

    name: in the report; task: of the requests; asks: a sentence on what is given and wanted;
    factors: what must be right, all of them together being the score `whole`.
    """

    name: str
    task: str
    asks: str
    factors: tuple[str, ...]
    whole = "joint"

    def __init__(self, world: SpriteWorld) -> None:
        self.world = world

    @property
    @abstractmethod
    def bars(self) -> tuple[Bar, ...]:
        """What must hold of the scores."""

    @abstractmethod
    def question(self, index: int) -> Question:
        """Question `index` >= 0; there is no last one."""

    def judged(self, clip: np.ndarray) -> np.ndarray:
        """The frames whose content is the generator's own."""
        return clip

    def scores(self, question: Question, clip: np.ndarray, verdict: Verdict) -> dict[str, Score]:
        """The scores of one answer; `verdict` is the judge's on `judged(clip)`."""
        right = self.right(question, verdict)
        return {name: float(value) for name, value in right.items()}

    def right(self, question: Question, verdict: Verdict) -> dict[str, bool]:
        """Which factors are right, and whether all are."""
        all_right = right_factors(verdict, question.expected)
        right = {name: all_right[name] for name in self.factors}
        return right | {self.whole: all(right.values())}

    def baselines(self, question: Question) -> dict[str, np.ndarray]:
        """Further clips to score beside the answer, by name."""
        return {}


def right_factors(verdict: Verdict, expected: Factors) -> dict[str, bool]:
    """Which factors are right, by the names that scores have.

    The judge reads class and colour where there is a sprite; one that is gone from too many frames
    is not what was asked for, whatever it was before.
    """
    there = verdict.seen >= LEAST_SEEN
    return {
        "class": there and verdict.class_index == expected.class_index,
        "colour": there and verdict.colour == expected.colour,
        "background": verdict.background == expected.background,
        "motion": verdict.motion == expected.motion,
    }


def drawn(name: str, choices: int) -> int:
    """0 .. choices - 1, by the SHA-256 of `name`: independent of every other name's."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % choices
