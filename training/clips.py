"""Clips of the sprite world as tokens: encoded once by a VQ-GAN, kept in one file.

Captions are not stored: they follow from the clip's number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from .sprites.world import FRAMES, SpriteWorld
from .vqgan import VQGAN, to_signed


@dataclass(frozen=True)
class TokenClips:
    """tokens int16 [count, frames, cells]: clip i is sample i of `world`."""

    tokens: npt.NDArray[np.int16]
    world: SpriteWorld

    def caption(self, index: int, *, video: bool) -> str:
        """The clip's video caption, or that of any of its frames."""
        factors = self.world.factors(index)
        return factors.video_caption if video else factors.image_caption


@torch.no_grad()
def encode_frames(vqgan: VQGAN, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """uint8 [F, H, W, 3] -> int16 [F, h * w], in bf16 where the CPU or GPU does that faster."""
    device = next(vqgan.parameters()).device
    pixels = to_signed(torch.from_numpy(frames).to(device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        codes = vqgan.encode(pixels).codes
    return codes.flatten(1).cpu().numpy().astype(np.int16)


def token_clips(
    vqgan: VQGAN, world: SpriteWorld, count: int, cache: Path, *, batch: int = 16
) -> TokenClips:
    """The first `count` clips of `world` as tokens, read from `cache` if it holds just those.

    cache: a .npy file; a .json beside it says which VQ-GAN and clips it is of.
    """
    identity = {
        "vqgan": _fingerprint(vqgan),
        "level": world.level,
        "split": world.split,
        "seed": world.seed,
        "count": count,
    }
    label = cache.with_suffix(".json")
    if cache.exists() and label.exists() and json.loads(label.read_text()) == identity:
        return TokenClips(np.load(cache, mmap_mode="r"), world)
    cells = vqgan.config.grid_size**2
    tokens = np.empty((count, FRAMES, cells), np.int16)
    for first in track(range(0, count, batch), description=f"encoding {count} clips"):
        indices = range(first, min(first + batch, count))
        frames = np.concatenate([world.sample(i).frames for i in indices])
        encoded = encode_frames(vqgan, frames).reshape(-1, FRAMES, cells)
        tokens[first : first + len(encoded)] = encoded
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, tokens)
    label.write_text(json.dumps(identity))
    return TokenClips(tokens, world)


def _fingerprint(vqgan: VQGAN) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vqgan.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
