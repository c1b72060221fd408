"""PSNR as it is reported: with a number for equal frames."""

from __future__ import annotations

import numpy as np

from ..metrics import psnr

IDENTICAL_DB = 100.0  # PSNR of equal frames, which is infinite, counts as this


def capped_psnr(clip: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB, at most IDENTICAL_DB."""
    return min(psnr(clip, target), IDENTICAL_DB)
