"""What there is to train on, behind one interface: the captioned moving sprites, a picture folder.

Recipes and token caches know a Source; the command line makes one.

Legend: F frames, H, W pixels, B samples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nuwa.spec.tasks import UNCONDITIONAL_PROMPT

from .openmoji.dataset import PictureFolder
from .sprites.world import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    SIDE,
    Factors,
    SpriteWorld,
    novel_pairs,
    render,
)

U8 = npt.NDArray[np.uint8]

LOOKS_THE_SAME = ("0", "1", "8")  # or like another class, once it is turned onto its side


class Source(Protocol):
    """Captioned clips by number, with class maps.

    count: how many clips there are, None if there is no end of them; frames: of a clip, 1 where
    there are only pictures; classes: of the class maps, background included; identity: says which
    source this is; provenance: data and licence, for a checkpoint.
    """

    @property
    def count(self) -> int | None: ...

    frames: int
    resolution: int
    classes: int
    identity: dict[str, Any]
    provenance: dict[str, str]

    def pictures(self, first: int, count: int) -> U8:
        """u8 [B, H, W, 3]: samples without end, for a tokenizer."""

    def maps(self, first: int, count: int) -> U8:
        """u8 [B, H, W]: class maps without end, for a tokenizer."""

    def clip(self, index: int, frames: range) -> tuple[U8, U8]:
        """(u8 [F, H, W, 3], u8 [F, H, W]): these frames of a clip and their class maps."""

    def stranger(self, index: int, frames: range) -> U8:
        """u8 [F, H, W, 3]: these frames of the clip, with something that no caption names."""

    def may_show(self, index: int, start: int) -> bool:
        """Whether prediction may be trained on the window of the clip that begins at `start`."""

    def steady(self, index: int) -> bool:
        """Whether the clip goes on to its end as it begins."""

    def caption(self, index: int, *, video: bool) -> str:
        """The clip's caption, or that of any of its frames."""

    def captions(self) -> list[str]:
        """Texts that hold every word, to train the text vocabulary on."""


class Sprites:
    """The training split of one level; clips go on beyond their end as the world says."""

    count = None
    frames, resolution, classes = FRAMES, SIDE, len(CLASSES) + 1

    def __init__(self, level: str) -> None:
        self.world = SpriteWorld(level, "train")
        self.identity = {"level": level, "split": "train", "seed": self.world.seed}
        self.provenance = {
            "data": f"captioned moving sprites, level {level}, split train: MNIST digits "
            "(CC BY-SA 3.0) and, at level full, animal-mnist silhouettes (MIT)",
            "licence": "Apache-2.0",
        }

    def pictures(self, first: int, count: int) -> U8:
        return np.stack([self.world.frame(i, i % FRAMES)[0] for i in range(first, first + count)])

    def maps(self, first: int, count: int) -> U8:
        return np.stack([self.world.frame(i, i % FRAMES)[1] for i in range(first, first + count)])

    def clip(self, index: int, frames: range) -> tuple[U8, U8]:
        return self.world.long_clip(index, frames)

    def stranger(self, index: int, frames: range) -> U8:
        """With a glyph turned onto its side, of a class that is not the same then."""
        plan = self.world.plan(index)
        known = [c for c, _ in self.world.pairs if CLASSES[c] not in LOOKS_THE_SAME]
        draw = np.random.default_rng((self.world.seed, index))
        glyph_TT = draw.choice(self.world.glyphs[draw.choice(known)])
        glyph_TT = np.rot90(glyph_TT, draw.choice((1, 3)))
        if draw.random() < 0.5:
            glyph_TT = glyph_TT[::-1]
        return render(dataclasses.replace(plan, glyph_TT=glyph_TT), frames)[0]

    def may_show(self, index: int, start: int) -> bool:
        """See may_predict; also where a clip that goes on comes to move otherwise than at first."""
        plan = self.world.plan(index)
        return may_predict(plan.factors.class_index, plan.shown_motion(start))

    def steady(self, index: int) -> bool:
        return self.world.factors(index).motion in DIRECTIONS

    def caption(self, index: int, *, video: bool) -> str:
        factors = self.world.factors(index)
        return factors.video_caption if video else factors.image_caption

    def captions(self) -> list[str]:
        """Those of both levels."""
        rows = [
            Factors(c, colour, background, motion)
            for c in range(len(CLASSES))
            for colour in COLOURS
            for background in BACKGROUNDS
            for motion in MOTIONS
        ]
        texts = [text for row in rows for text in (row.image_caption, row.video_caption)]
        return [*texts, UNCONDITIONAL_PROMPT]


def may_predict(class_index: int, motion: str | None) -> bool:
    """Not a class that moves as it only does in split `novel`, with motion as of shown_motion.

    Nor one that turns where its going straight on is kept for that split: of these a model would
    learn that such a class always turns.
    """
    begins = None if motion is None else motion.split()[0]
    return not {(class_index, motion), (class_index, begins)} & novel_pairs()


class Pictures:
    """The training split of a picture folder (openmoji/folder.py); seed: of its shuffling."""

    frames = 1

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = PictureFolder(folder)
        self.count = len(self.folder)
        self.resolution, self.classes = self.folder.resolution, len(self.folder.classes)
        self.identity = {"data": self.folder.data}
        told = [
            self.folder.data[key] for key in ("source", "attribution") if key in self.folder.data
        ]
        self.provenance = {
            "data": ", ".join(told) or "not stated",
            "licence": self.folder.data.get("licence", "not stated"),
        }
        self._pictures, self._maps = self.folder.pictures(seed), self.folder.sketches(seed)

    def pictures(self, first: int, count: int) -> U8:
        return self._pictures(first, count)

    def maps(self, first: int, count: int) -> U8:
        return self._maps(first, count)

    def clip(self, index: int, frames: range) -> tuple[U8, U8]:
        """The one picture, whatever frame is asked for."""
        count = len(frames)
        picture, sketch = self.folder.picture(index), self.folder.sketch(index)
        return picture[None].repeat(count, axis=0), sketch[None].repeat(count, axis=0)

    def stranger(self, index: int, frames: range) -> U8:
        """The picture turned onto its side."""
        return np.ascontiguousarray(np.rot90(self.clip(index, frames)[0], axes=(1, 2)))

    def may_show(self, index: int, start: int) -> bool:
        return True

    def steady(self, index: int) -> bool:
        return True

    def caption(self, index: int, *, video: bool) -> str:
        return self.folder.caption(index)

    def captions(self) -> list[str]:
        texts = [self.folder.caption(index) for index in range(len(self.folder))]
        return [*texts, UNCONDITIONAL_PROMPT]
