"""Distances and scores on arrays: Fréchet distance, PSNR, SSIM, mean IoU, intervals.

Plain numpy in float64. Knows no model, no judge and no file.
"""

from __future__ import annotations

import functools
import math
import statistics

import numpy as np


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, f[N,D] and f[M,D].

    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^1/2), where the trace of the root is the sum of
    the roots of the eigenvalues of A^1/2 B A^1/2: symmetric, so nothing turns complex. N, M >= 2.
    The value is biased upwards when there are few samples: compare equal N only.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError(f"{len(a_ND)} and {len(b_MD)} samples; a covariance needs at least 2")
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a_ND, b_MD))
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.linalg.eigvalsh(root_a @ covariance_b @ root_a).clip(0)
    means = np.square(a_ND.mean(0) - b_MD.mean(0)).sum()
    traces = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(shared).sum()
    return float(max(means + traces, 0.0))


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite when equal."""
    if image.shape != target.shape:
        raise ValueError(f"shapes {image.shape} and {target.shape} differ")
    error = np.square(image.astype(np.float64) - target.astype(np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # of the window: 11 x 11 pixels
SSIM_FLOORS = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)


def ssim(image: np.ndarray, target: np.ndarray) -> float:
    """Structural similarity of uint8 [F,H,W,C] or [H,W,C] (Wang et al. 2004); 1 when equal.

    Gaussian window of 11 x 11 pixels, channel by channel, averaged over windows that lie wholly
    inside. ValueError if the shapes differ or are smaller than the window.
    """
    if image.shape != target.shape:
        raise ValueError(f"shapes {image.shape} and {target.shape} differ")
    if min(image.shape[-3:-1]) <= 2 * SSIM_RADIUS:
        raise ValueError(f"shape {image.shape} is smaller than the window of 11 pixels")
    a, b = image.astype(np.float64), target.astype(np.float64)
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a = _windowed(a * a) - mean_a**2
    variance_b = _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    floor_mean, floor_variance = SSIM_FLOORS
    mean_part = (2 * mean_a * mean_b + floor_mean) / (mean_a**2 + mean_b**2 + floor_mean)
    other_part = (2 * covariance + floor_variance) / (variance_a + variance_b + floor_variance)
    return float((mean_part * other_part).mean())


def _windowed(values_FHWC: np.ndarray) -> np.ndarray:
    """Gaussian means over all windows inside, f64[..., C, H-10, W-10]."""
    across_HI, across_WJ = (_window_matrix(size) for size in values_FHWC.shape[-3:-1])
    return across_HI.T @ np.moveaxis(values_FHWC, -1, -3) @ across_WJ


@functools.cache
def _window_matrix(size: int) -> np.ndarray:
    """f64[size, size-10]: column j holds the taps of the window that starts at pixel j."""
    taps = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    offsets = np.arange(size)[:, None] - np.arange(size - 2 * SSIM_RADIUS)
    inside = (offsets >= 0) & (offsets < len(taps))
    return np.where(inside, (taps / taps.sum())[offsets.clip(0, len(taps) - 1)], 0.0)


def mean_iou(labels: np.ndarray, target: np.ndarray, classes: int) -> float:
    """Mean over classes of intersection / union of two integer maps; 1 is a perfect match.

    Classes that are in neither map do not count.
    """
    return float(mean_iou_of(confusion(labels, target, classes)))


def confusion(labels: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """i64[C,C]: pixels of two integer maps by label (row) and target (column)."""
    if labels.shape != target.shape:
        raise ValueError(f"shapes {labels.shape} and {target.shape} differ")
    pairs = labels.astype(np.int64).ravel() * classes + target.astype(np.int64).ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def mean_iou_of(confusion_CC: np.ndarray) -> np.ndarray:
    """f64[...] of confusion matrices [...,C,C], over the classes that occur, as PASCAL VOC does."""
    shared = np.diagonal(confusion_CC, axis1=-2, axis2=-1)
    union = confusion_CC.sum(-1) + confusion_CC.sum(-2) - shared
    iou = np.divide(shared, union, out=np.zeros(union.shape), where=union > 0)
    return iou.sum(-1) / (union > 0).sum(-1)


CONFIDENCE, RESAMPLES = 0.95, 2000


def resampled_means(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """f64[R,...]: the means of R resamples of f[N,...] with replacement.

    Arrays of the same N are resampled alike, so what is computed from several of them is paired.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if count == 0:
        raise ValueError("no values to resample")
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    picks += np.arange(RESAMPLES)[:, None] * count
    times_RN = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
    means = times_RN @ values.reshape(count, -1) / count
    return means.reshape(RESAMPLES, *values.shape[1:])


def percentile_interval(low_R: np.ndarray, high_R: np.ndarray | None = None) -> tuple[float, float]:
    """The middle CONFIDENCE of f[R]; high_R: resamples for the upper end, where they are others."""
    tail = (1 - CONFIDENCE) / 2
    high_R = low_R if high_R is None else high_R
    return float(np.quantile(low_R, tail)), float(np.quantile(high_R, 1 - tail))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` independent yes-or-no answers."""
    spread = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2 / count
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max((centre - half) / (1 + spread), 0.0), min((centre + half) / (1 + spread), 1.0)
