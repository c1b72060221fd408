"""Takes codes out of a codebook that are synonyms: they stand for empty background alone.

A VQ-GAN spends many codes on plain background, chosen by faint global differences; a model would
have to learn a choice that nobody can see. All but one of those codes go; the encoder then uses the
nearest one left. Of pictures and of class maps, which say what is background: class 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from .vqgan import VQGAN, one_hot, to_signed

Pixels = npt.NDArray[np.uint8]
PLAIN = 8  # levels of a channel that a plain cell may span


@torch.no_grad()
def prune_codebook(
    vqgan: VQGAN,
    clips: Iterable[tuple[Pixels, Pixels]],
    *,
    threshold: float = 0.9,
    sketches: bool = False,
) -> VQGAN:
    """A copy with fewer codes; its output changes only where a dropped code was used.

    clips: frames u8 [F, H, W, 3] and class maps u8 [F, H, W]; sketches: the maps are what is
    tokenized. A code is dropped if more than `threshold` of its cells are plain background, or if
    it is never used; the code nearest to the mean background feature stays.
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold {threshold} is not between 0 and 1")
    size, patch = vqgan.config.codebook_size, vqgan.config.downsampling
    counts = np.zeros((2, size))
    total, cells = torch.zeros(vqgan.config.embedding_dim), 0
    for frames, classes in clips:
        empty = ~_cells(classes, patch).any(axis=(2, 4))
        if sketches:
            encoded = vqgan.encode(one_hot(torch.from_numpy(classes), vqgan.config.channels))
        else:
            encoded = vqgan.encode(to_signed(torch.from_numpy(frames)))
            empty &= _plain(frames, patch)
        codes = encoded.codes.numpy()
        for row, where in enumerate((empty, ~empty)):
            counts[row] += np.bincount(codes[where], minlength=size)
        features = encoded.features.permute(0, 2, 3, 1)[torch.from_numpy(empty)]
        total, cells = total + features.float().sum(0), cells + len(features)
    weight = vqgan.quantize.embedding.weight
    stays = int(((weight - total / cells) ** 2).sum(1).argmin())
    used = counts.sum(0)
    keep = (used > 0) & (counts[0] <= threshold * used)
    keep[stays] = True
    return _with_codes(vqgan, torch.from_numpy(np.flatnonzero(keep)))


def _cells(values: npt.NDArray, patch: int) -> npt.NDArray:
    """[F, H, W, ...] -> [F, h, patch, w, patch, ...]."""
    frames, height, width, *rest = values.shape
    return values.reshape(frames, height // patch, patch, width // patch, patch, *rest)


def _plain(frames: Pixels, patch: int) -> npt.NDArray[np.bool_]:
    """bool [F, h, w]: cells of one colour; an object's faint edge alone has no class, but shows."""
    cells = _cells(frames, patch)
    spread = cells.max(axis=(2, 4)).astype(int) - cells.min(axis=(2, 4))
    return (spread <= PLAIN).all(axis=-1)


def _with_codes(vqgan: VQGAN, chosen: torch.Tensor) -> VQGAN:
    config = dataclasses.replace(vqgan.config, codebook_size=len(chosen))
    state = vqgan.state_dict()
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][chosen]
    pruned = VQGAN(config)
    pruned.load_state_dict(state)
    return pruned.eval()
