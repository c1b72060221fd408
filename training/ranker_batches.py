"""Batches for the ranker: captioned pictures of the sprites, and captions that are wrong for them.

Some pictures went through the VQ-GAN or are damaged, as generated ones are. Nothing here knows the
ranker.

Legend: B pictures, F frames, S canvas side, T texts, M text length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from nuwa.spec.text import TextTokenizer

from .sprites import world as sprites
from .sprites.world import FRAMES, MOTIONS, Factors, SpriteWorld
from .stored import fingerprint, stored
from .vqgan import VQGAN, to_bytes, to_signed

Pixels = npt.NDArray[np.uint8]
IMAGE_FACTORS = ("class", "colour", "background")
CLIP_FACTORS = (*IMAGE_FACTORS, "motion")
PIECE = 8  # side of a misplaced square


@dataclass(frozen=True)
class RankerBatches:
    """Draws pictures of `world`, and texts to tell them by.

    seen: `reconstructions` of its first clips, which half of the pictures are drawn from, if any;
    damaged: share of frames with a misplaced square; negatives: changed captions per picture and
    factor.
    """

    world: SpriteWorld
    captions: Captions
    seen: Pixels | None
    damaged: float
    negatives: int

    def pictures(
        self, first: int, count: int, draw: np.random.Generator, *, video: bool
    ) -> tuple[Tensor, list[Factors]]:
        """Pictures uint8 [B, F, S, S, 3], damaged, and their factors: half of them as seen."""
        pictures, factors = [], []
        for index in range(first, first + count):
            frame = int(draw.integers(FRAMES))
            if self.seen is not None and draw.random() < 0.5:
                index = int(draw.integers(len(self.seen)))
                frames = np.array(self.seen[index] if video else self.seen[index, frame][None])
            elif video:
                frames = self.world.sample(index).frames
            else:
                frames = self.world.frame(index, frame)[0][None]
            pictures.append(damage(frames, draw, self.damaged))
            factors.append(self.world.factors(index))
        return torch.from_numpy(np.stack(pictures)).to(self.captions.device), factors

    def texts(
        self, factors: list[Factors], draw: np.random.Generator, *, video: bool
    ) -> tuple[Tensor, Tensor]:
        """Ids [T, M] of the pictures' captions and of changed ones, each once; own_B among them."""
        changed: list[Factors] = []
        for one in factors:
            for name in CLIP_FACTORS if video else IMAGE_FACTORS:
                others = one_changed(one, name, self.world, trained=video)
                picked = draw.permutation(len(others))[: self.negatives]
                changed += [others[i] for i in picked]
        captions = [caption(one, video=video) for one in [*factors, *changed]]
        rows = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        own_B = torch.tensor([rows[text] for text in captions[: len(factors)]])
        return self.captions.ids(rows), own_B.to(self.captions.device)


class Captions:
    """Texts as rows of ids, each tokenized once."""

    def __init__(self, tokenizer: TextTokenizer, device: torch.device) -> None:
        self.tokenizer, self.device = tokenizer, device
        self._rows: dict[str, npt.NDArray[np.int32]] = {}

    def ids(self, texts: Iterable[str]) -> Tensor:
        """int64 [T, M], M the longest of these texts."""
        rows = np.stack([self._row(text) for text in texts])
        used = (rows != self.tokenizer.pad).sum(1).max()
        return torch.from_numpy(rows[:, :used].astype(np.int64)).to(self.device)

    def _row(self, text: str) -> npt.NDArray[np.int32]:
        if text not in self._rows:
            self._rows[text] = self.tokenizer.encode(text)
        return self._rows[text]


def caption(factors: Factors, *, video: bool) -> str:
    """The caption of a clip, or of one of its frames."""
    return factors.video_caption if video else factors.image_caption


def one_changed(
    factors: Factors, name: str, world: SpriteWorld, *, trained: bool = False
) -> list[Factors]:
    """All factors of a level that differ from `factors` in the one named (see CLIP_FACTORS).

    trained: without class-motion pairs that the split never shows. Held against every clip of
    training, captions of novel pairs would be learned as wrong.
    """
    if name not in CLIP_FACTORS:
        raise ValueError(f"factor {name!r} is not one of {', '.join(CLIP_FACTORS)}")
    attribute = "class_index" if name == "class" else name
    choices: dict[str, Iterable] = {
        "class": range(world.class_count),
        "colour": world.colours,
        "background": world.backgrounds,
        "motion": MOTIONS,
    }
    own = getattr(factors, attribute)
    changed = [
        dataclasses.replace(factors, **{attribute: value})
        for value in choices[name]
        if value != own
    ]
    shown = set(world.pairs)
    return [c for c in changed if not trained or (c.class_index, c.motion) in shown]


def damage(frames_FSS3: Pixels, draw: np.random.Generator, share: float) -> Pixels:
    """A copy: half of the clips noisy, and in a share of frames a square where it does not belong.

    The square is of the same frame, so ink is erased as often as it appears.
    """
    frames = frames_FSS3.copy()
    side = frames.shape[1]
    for f in np.flatnonzero(draw.random(len(frames)) < share):
        y, x, v, u = draw.integers(side - PIECE + 1, size=4)
        frames[f, y : y + PIECE, x : x + PIECE] = frames_FSS3[f, v : v + PIECE, u : u + PIECE]
    if draw.random() < 0.5:
        strength = draw.uniform(1.0, 10.0)
        noise = strength * draw.standard_normal(frames.shape, dtype=np.float32)
        frames = (frames + noise).round().clip(0, 255).astype(np.uint8)
    return frames


@torch.no_grad()
def reconstructions(
    vqgan: VQGAN, world: SpriteWorld, count: int, cache: Path, *, bf16: bool
) -> Pixels:
    """uint8 [count, F, S, S, 3]: the first clips of `world` as the VQ-GAN gives them back.

    cache: a .npy file, read if it holds just those; a .json beside it says what it holds.
    """

    def decoded() -> Pixels:
        clips = []
        for index in track(range(count), f"reconstructing {count} clips of {world.split}"):
            frames = torch.from_numpy(world.sample(index).frames)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                pixels = vqgan.decode(vqgan.encode(to_signed(frames)).codes)
            clips.append(to_bytes(pixels).numpy())
        return np.stack(clips)

    identity = {
        "vqgan": fingerprint(vqgan),
        "world_version": sprites.VERSION,
        "level": world.level,
        "split": world.split,
        "count": count,
        "bf16": bf16,
    }
    return stored(cache, identity, decoded)
