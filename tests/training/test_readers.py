"""The analytic readers on real clips, spoiled clips and clips with nothing to read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from nuwa.training.readers import (
    NONE,
    locate,
    median_colour,
    read_background,
    read_colour,
    read_motion,
)
from nuwa.training.sprites.world import LEVELS, SPLITS, SpriteWorld


def _read(frames):
    layout = locate(frames)
    return read_colour(frames, layout), read_background(layout), read_motion(layout.track_F2)


def _truth(sample):
    return sample.factors.colour, sample.factors.background, sample.factors.motion


def _blurred(frames, sigma, noise):
    rng = np.random.default_rng(0)
    soft = [Image.fromarray(f).filter(ImageFilter.GaussianBlur(sigma)) for f in frames]
    return (np.array(soft) + rng.normal(0, noise, frames.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_real_clips_are_read_without_error(level, split):
    world = SpriteWorld(level, split)
    for index in range(60):
        sample = world.sample(index)
        assert _read(sample.frames) == _truth(sample), sample.video_caption


def test_one_image_has_colour_and_background_but_no_motion():
    sample = SpriteWorld("full", "test").sample(5)
    assert _read(sample.frames[:1]) == (*_truth(sample)[:2], NONE)


@pytest.mark.parametrize("level", LEVELS)
def test_blur_and_noise_hardly_matter(level):
    world = SpriteWorld(level, "val")
    samples = [world.sample(index) for index in range(60)]
    right = np.array([np.equal(_read(_blurred(s.frames, 1.2, 8)), _truth(s)) for s in samples])
    assert (right.mean(0) >= 0.98).all()


def test_an_empty_clip_has_no_colour_and_no_motion():
    black = np.zeros((10, 64, 64, 3), np.uint8)
    assert _read(black) == (NONE, "black", NONE)
    assert _read(black + np.array([0, 60, 120], np.uint8)) == (NONE, NONE, NONE), "blue has no name"


def test_a_sprite_at_rest_or_in_disorder_has_no_motion():
    world = SpriteWorld("digits", "test")
    for index in range(30):
        frames = world.sample(index).frames
        assert _read(frames[[3] * 10])[2] == NONE
        assert _read(frames[[0, 5, 1, 9, 3, 7, 2, 8, 4, 6]])[2] == NONE


def test_time_reversed_clips_are_read_as_the_opposite():
    world, opposite = SpriteWorld("digits", "test"), {"left": "right", "up": "down"}
    opposite |= {b: a for a, b in opposite.items()}
    for index in range(60):
        sample = world.sample(index)
        first, *then = sample.factors.motion.split(" then ")
        expected = sample.factors.motion if then else opposite[first]
        assert _read(sample.frames[::-1])[2] == expected


def test_two_lost_frames_and_a_stray_blob_do_not_change_the_motion():
    world = SpriteWorld("digits", "test")
    for index in range(30):
        sample = world.sample(index)
        frames = sample.frames.copy()
        frames[[2, 7]] = 0
        row = 0 if locate(frames).track_F2[0, 0] > 32 else 60
        frames[:, row : row + 4, 0:4] = 200
        assert _read(frames)[2] == sample.factors.motion


def test_a_swapped_colour_is_read_as_the_new_colour():
    world = SpriteWorld("digits", "test")
    for index in range(30):
        sample = world.sample(index)
        if sample.factors.colour == "red":
            assert _read(sample.frames[..., [1, 0, 2]])[0] == "green"


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 3), (10, 64, 64, 3)])
def test_the_median_colour_is_that_of_numpy(shape):
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(median_colour(frames), np.median(frames.reshape(-1, 3), axis=0))
