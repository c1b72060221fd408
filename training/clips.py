"""Clips of the sprite world as tokens: encoded once by the VQ-GANs, kept in files.

Captions are not stored: they follow from the clip's number.

Legend: F frames, H, W pixels, C cells of a frame.
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
from .vqgan import VQGAN, one_hot, to_signed

Codes = npt.NDArray[np.int16]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TokenClips:
    """tokens int16 [count, F, C]: clip i is sample i of `world`; sketches: its class maps'."""

    tokens: Codes
    world: SpriteWorld
    sketches: Codes | None = None

    def caption(self, index: int, *, video: bool) -> str:
        """The clip's video caption, or that of any of its frames."""
        factors = self.world.factors(index)
        return factors.video_caption if video else factors.image_caption

    def pixels(self, index: int, frames: range) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        """Frames u8 [F, H, W, 3] of a clip, also beyond its end, and where its object is [F, H, W].

        Beyond its end a clip goes on as its world says.
        """
        pixels, classes = self.world.long_clip(index, frames)
        return pixels, classes > 0


@torch.no_grad()
def encode_frames(vqgan: VQGAN, frames: Pixels) -> Codes:
    """uint8 [F, H, W, 3] -> int16 [F, C], in bf16 where the CPU or GPU does that faster."""
    return _encode(vqgan, to_signed(torch.from_numpy(frames)))


@torch.no_grad()
def encode_maps(vqgan: VQGAN, maps: Pixels) -> Codes:
    """Class ids uint8 [F, H, W] -> int16 [F, C]."""
    return _encode(vqgan, one_hot(torch.from_numpy(maps), vqgan.config.channels))


def _encode(vqgan: VQGAN, inputs: torch.Tensor) -> Codes:
    device = next(vqgan.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16):
        codes = vqgan.encode(inputs.to(device)).codes
    return codes.flatten(1).cpu().numpy().astype(np.int16)


def token_clips(
    vqgan: VQGAN,
    world: SpriteWorld,
    count: int,
    cache: Path,
    *,
    sketch_vqgan: VQGAN | None = None,
    batch: int = 16,
) -> TokenClips:
    """The first `count` clips of `world` as tokens, read from `cache` if it holds just those.

    cache: a .npy file; a .json beside it says which VQ-GAN and clips it is of. Sketches go to a
    second pair of files, `cache` with `.sketches` before its suffix.
    """
    tokens = _cached(vqgan, world, count, cache, batch, sketch=False)
    sketches = None
    if sketch_vqgan is not None:
        beside = cache.with_suffix(f".sketches{cache.suffix}")
        sketches = _cached(sketch_vqgan, world, count, beside, batch, sketch=True)
    return TokenClips(tokens, world, sketches)


def _cached(
    vqgan: VQGAN, world: SpriteWorld, count: int, cache: Path, batch: int, *, sketch: bool
) -> Codes:
    identity = {
        "vqgan": _fingerprint(vqgan),
        "level": world.level,
        "split": world.split,
        "seed": world.seed,
        "count": count,
    }
    label = cache.with_suffix(".json")
    if cache.exists() and label.exists() and json.loads(label.read_text()) == identity:
        return np.load(cache, mmap_mode="r")
    cells = vqgan.config.grid_size**2
    tokens = np.empty((count, FRAMES, cells), np.int16)
    kind = "sketches" if sketch else "clips"
    for first in track(range(0, count, batch), description=f"encoding {count} {kind}"):
        samples = [world.sample(i) for i in range(first, min(first + batch, count))]
        if sketch:
            encoded = encode_maps(vqgan, np.concatenate([s.segmentation for s in samples]))
        else:
            encoded = encode_frames(vqgan, np.concatenate([s.frames for s in samples]))
        tokens[first : first + len(samples)] = encoded.reshape(-1, FRAMES, cells)
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, tokens)
    label.write_text(json.dumps(identity))
    return tokens


def _fingerprint(vqgan: VQGAN) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vqgan.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
