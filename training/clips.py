"""Clips as tokens: encoded by the VQ-GANs as they are drawn, or once, and kept in files.

Captions are not stored: they follow from the clip's number.

Legend: B rows, F frames, H, W pixels, C cells of a frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from .precision import fast_bf16
from .sources import Source
from .stored import fingerprint, stored
from .vqgan import VQGAN, one_hot, to_signed

Codes = npt.NDArray[np.int16]
Long = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Spans = Sequence[tuple[int, range]]  # clips and which of their frames


ENDLESS = 1 << 31  # clips of a source without end


class Clips(Protocol):
    """Clips of `source` as tokens; count: their numbers are below it."""

    @property
    def source(self) -> Source: ...

    @property
    def count(self) -> int: ...

    def codes(self, spans: Spans) -> Long:
        """int64 [B, F, C]: picture tokens of these frames of these clips."""

    def sketches(self, spans: Spans) -> Long:
        """int64 [B, F, C]: sketch tokens of these frames of these clips."""


@dataclass(frozen=True)
class StoredClips:
    """Clips tokenized beforehand: fast, but a model soon knows a few thousand clips by heart."""

    tokens: Codes
    source: Source
    sketch_tokens: Codes | None = None

    @property
    def count(self) -> int:
        return len(self.tokens)

    def codes(self, spans: Spans) -> Long:
        return _cut(self.tokens, spans)

    def sketches(self, spans: Spans) -> Long:
        assert self.sketch_tokens is not None, "these clips have no sketches"
        return _cut(self.sketch_tokens, spans)


class FreshClips:
    """Clips tokenized as they are drawn, so that hardly one is seen twice."""

    def __init__(
        self,
        vqgan: VQGAN,
        source: Source,
        sketch_vqgan: VQGAN | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self.source, self.count = source, ENDLESS if source.count is None else source.count
        self._vqgan = copy.deepcopy(vqgan).to(device)
        self._sketch_vqgan = copy.deepcopy(sketch_vqgan).to(device) if sketch_vqgan else None

    def codes(self, spans: Spans) -> Long:
        frames = [self.source.clip(index, span)[0] for index, span in spans]
        return _together(encode_frames(self._vqgan, np.concatenate(frames)), len(spans))

    def sketches(self, spans: Spans) -> Long:
        assert self._sketch_vqgan is not None, "these clips have no sketches"
        maps = [self.source.clip(index, span)[1] for index, span in spans]
        return _together(encode_maps(self._sketch_vqgan, np.concatenate(maps)), len(spans))


def _cut(tokens: Codes, spans: Spans) -> Long:
    return np.stack([tokens[i, s.start : s.stop] for i, s in spans]).astype(np.int64)


def _together(codes: Codes, count: int) -> Long:
    return codes.reshape(count, -1, codes.shape[-1]).astype(np.int64)


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
    bf16 = fast_bf16(device.type)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        codes = vqgan.encode(inputs.to(device)).codes
    return codes.flatten(1).cpu().numpy().astype(np.int16)


def store_clips(
    vqgan: VQGAN,
    source: Source,
    count: int,
    cache: Path,
    *,
    sketch_vqgan: VQGAN | None = None,
    batch: int = 16,
) -> StoredClips:
    """The first `count` clips of `source` as tokens, read from `cache` if it holds just those.

    cache: a .npy file; a .json beside it says which VQ-GAN and clips it is of. Sketches go to a
    second pair of files, `cache` with `.sketches` before its suffix.
    """
    tokens = _cached(vqgan, source, count, cache, batch, sketch=False)
    sketches = None
    if sketch_vqgan is not None:
        beside = cache.with_suffix(f".sketches{cache.suffix}")
        sketches = _cached(sketch_vqgan, source, count, beside, batch, sketch=True)
    return StoredClips(tokens, source, sketches)


def _cached(
    vqgan: VQGAN, source: Source, count: int, cache: Path, batch: int, *, sketch: bool
) -> Codes:
    cells = vqgan.config.grid_size**2
    kind = "sketches" if sketch else "clips"

    def encoded() -> Codes:
        tokens = np.empty((count, source.frames, cells), np.int16)
        for first in track(range(0, count, batch), description=f"encoding {count} {kind}"):
            indices, span = range(first, min(first + batch, count)), range(source.frames)
            pixels, maps = zip(*(source.clip(i, span) for i in indices), strict=True)
            if sketch:
                codes = encode_maps(vqgan, np.concatenate(maps))
            else:
                codes = encode_frames(vqgan, np.concatenate(pixels))
            tokens[first : first + len(indices)] = codes.reshape(-1, source.frames, cells)
        return tokens

    identity = {"vqgan": fingerprint(vqgan), **source.identity, "count": count}
    return stored(cache, identity, encoded)
