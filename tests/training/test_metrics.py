"""Metrics against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nuwa.training.metrics import (
    confusion,
    frechet_distance,
    mean_iou,
    mean_iou_of,
    percentile_interval,
    psnr,
    resampled_means,
    ssim,
    wilson_interval,
)


def _whitened(count, size, seed):
    """Samples whose mean is exactly 0 and covariance exactly the identity."""
    x = np.random.default_rng(seed).normal(size=(count, size))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_of_diagonal_gaussians():
    a, b = _whitened(200, 5, 0), _whitened(300, 5, 1)
    sigma_a, sigma_b = np.array([1, 2, 3, 0.5, 0]), np.array([2, 2, 1, 0, 0.1])
    shift = np.array([1.0, -2, 0, 0, 0.5])
    expected = np.square(shift).sum() + np.square(sigma_a - sigma_b).sum()
    assert frechet_distance(a * sigma_a + shift, b * sigma_b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    # In two dimensions trace((AB)^1/2)^2 = trace(AB) + 2 det(AB)^1/2.
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.8], [-0.8, 4.0]])
    samples = [
        _whitened(50, 2, i) @ np.linalg.cholesky(covariance).T
        for i, covariance in enumerate((a, b))
    ]
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(*samples) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_zero_on_itself_symmetric_and_blind_to_rotation():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(40, 64)), rng.normal(size=(50, 64)) * 2 + 1  # fewer samples than D
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    turn, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    with pytest.raises(ValueError, match="1 and 50 samples"):
        frechet_distance(a[:1], b)


def test_psnr():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == 0.0
    assert psnr(black + 1, black) == pytest.approx(20 * math.log10(255))
    assert psnr(black, black) == math.inf
    with pytest.raises(ValueError, match="differ"):
        psnr(black, black[:2])


def test_ssim_of_known_pictures():
    """Values of scikit-image 0.26: gaussian_weights, sigma 1.5, no sample covariance."""
    numbers = np.arange(24 * 32 * 3).reshape(24, 32, 3)
    noise = (numbers * 37 % 256).astype(np.uint8)
    moved = ((numbers * 37 + numbers // 5 % 60) % 256).astype(np.uint8)
    brighter = np.clip(noise.astype(int) + 20, 0, 255).astype(np.uint8)
    columns = np.mgrid[:24, :32][1][..., None]
    slope = (columns * 8 + np.array([0, 3, 5])).clip(0, 255).astype(np.uint8)
    flatter = (slope // 2 + 30).astype(np.uint8)
    assert ssim(noise, moved) == pytest.approx(0.4234754620231039, rel=1e-9)
    assert ssim(noise, brighter) == pytest.approx(0.989232785054972, rel=1e-9)
    assert ssim(slope, flatter) == pytest.approx(0.8112291605039103, rel=1e-9)
    assert ssim(noise, slope) == pytest.approx(0.009968938294006616, rel=1e-9)
    assert ssim(noise, noise) == 1.0
    clip = np.stack([noise, slope])
    mean = (ssim(noise, moved) + ssim(slope, flatter)) / 2
    assert ssim(clip, np.stack([moved, flatter])) == pytest.approx(mean)
    with pytest.raises(ValueError, match="differ"):
        ssim(noise, noise[:20])
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(noise[:10], noise[:10])


def test_mean_iou_by_hand():
    target = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    labels = np.array([[0, 1, 1, 1], [0, 0, 1, 2]])
    # class 0: 3/4; class 1: 3/5; class 2: 0/1; class 3 is in neither map
    assert mean_iou(labels, target, 4) == pytest.approx((3 / 4 + 3 / 5 + 0) / 3)
    assert mean_iou(target, target, 4) == 1.0


def test_iou_of_many_matrices_is_that_of_each():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 3, (4, 2, 5, 5))
    each = [confusion(labels, target, 5) for labels, target in maps]
    assert each[0][maps[0, 0, 0, 0], maps[0, 1, 0, 0]] > 0, "by label, then by target"
    expected = [mean_iou(labels, target, 5) for labels, target in maps]
    np.testing.assert_allclose(mean_iou_of(np.stack(each)), expected)
    together = mean_iou(maps[:, 0], maps[:, 1], 5)
    assert mean_iou_of(np.sum(each, axis=0)) == pytest.approx(together)


def test_bootstrap_interval_covers_as_the_normal_approximation_does():
    values = np.repeat([1.0, 0.0], [300, 100])
    low, high = percentile_interval(resampled_means(values))
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.006)
    assert high == pytest.approx(0.75 + half, abs=0.006)
    with pytest.raises(ValueError, match="no values"):
        resampled_means(np.array([]))


def test_arrays_of_one_length_are_resampled_alike():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 50))
    means = resampled_means(np.stack([a, b], axis=1))
    assert means.shape == (2000, 2)
    np.testing.assert_allclose(means[:, 0] - means[:, 1], resampled_means(a - b))
    # A difference that is the same everywhere has no spread, however much both have.
    low, high = percentile_interval(resampled_means(a + 1) - resampled_means(a))
    assert low == pytest.approx(1) and high == pytest.approx(1)


def test_wilson_interval_of_known_counts():
    """Values of R's prop.test(8, 10, correct = FALSE), and n / (n + 1.96^2) where all are alike."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(1.0, 10) == pytest.approx((10 / (10 + 3.841459), 1.0), abs=1e-6)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
