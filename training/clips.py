"""Clips as tokens: encoded once by the VQ-GANs, kept in files.

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

from .sources import Source
from .vqgan import VQGAN, one_hot, to_signed

Codes = npt.NDArray[np.int16]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TokenClips:
    """tokens int16 [count, F, C]: clip i is that of `source`; sketches: those of its class maps."""

    tokens: Codes
    source: Source
    sketches: Codes | None = None


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
    source: Source,
    count: int,
    cache: Path,
    *,
    sketch_vqgan: VQGAN | None = None,
    batch: int = 16,
) -> TokenClips:
    """The first `count` clips of `source` as tokens, read from `cache` if it holds just those.

    cache: a .npy file; a .json beside it says which VQ-GAN and clips it is of. Sketches go to a
    second pair of files, `cache` with `.sketches` before its suffix.
    """
    tokens = _cached(vqgan, source, count, cache, batch, sketch=False)
    sketches = None
    if sketch_vqgan is not None:
        beside = cache.with_suffix(f".sketches{cache.suffix}")
        sketches = _cached(sketch_vqgan, source, count, beside, batch, sketch=True)
    return TokenClips(tokens, source, sketches)


def _cached(
    vqgan: VQGAN, source: Source, count: int, cache: Path, batch: int, *, sketch: bool
) -> Codes:
    identity = {"vqgan": _fingerprint(vqgan), **source.identity, "count": count}
    label = cache.with_suffix(".json")
    if cache.exists() and label.exists() and json.loads(label.read_text()) == identity:
        return np.load(cache, mmap_mode="r")
    cells = vqgan.config.grid_size**2
    tokens = np.empty((count, source.frames, cells), np.int16)
    kind = "sketches" if sketch else "clips"
    for first in track(range(0, count, batch), description=f"encoding {count} {kind}"):
        indices, span = range(first, min(first + batch, count)), range(source.frames)
        pixels, maps = zip(*(source.clip(i, span) for i in indices), strict=True)
        if sketch:
            encoded = encode_maps(vqgan, np.concatenate(maps))
        else:
            encoded = encode_frames(vqgan, np.concatenate(pixels))
        tokens[first : first + len(indices)] = encoded.reshape(-1, source.frames, cells)
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
