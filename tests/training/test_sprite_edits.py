"""Edited samples: exactly one factor differs, and nothing leaves the box."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from nuwa.training.readers import locate, read_motion
from nuwa.training.sprites.edits import EDITS, aligned, edited, tile_box
from nuwa.training.sprites.world import LEVELS, SpriteWorld


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["test", "novel"])
def test_an_edit_changes_one_factor_inside_the_box(level, split):
    world = SpriteWorld(level, split)
    for index in range(40):
        sample = world.sample(index)
        top, left, bottom, right = aligned(tile_box(world, index, range(10)), 8)
        assert not any(edge % 8 for edge in (top, left, bottom, right))
        for factor in EDITS:
            other = edited(world, index, factor)
            if other is None:
                continue
            changed = {
                name
                for name, value in asdict(other.factors).items()
                if value != asdict(sample.factors)[name]
            }
            assert changed == {"class_index" if factor == "class" else factor}
            assert (other.factors.class_index, other.factors.motion) in world.pairs
            assert read_motion(locate(other.frames).track_F2) == other.factors.motion
            differs = (other.frames != sample.frames).any(-1).any(0)
            differs[top:bottom, left:right] = False
            assert not differs.any()


def test_every_sample_of_test_can_change_colour_and_class():
    world = SpriteWorld("digits", "test")
    assert all(edited(world, i, f) is not None for i in range(60) for f in ("colour", "class"))
    assert sum(edited(world, i, "motion") is not None for i in range(60)) > 40


def test_a_mirrored_one_way_clip_is_the_clip_backwards():
    world = SpriteWorld("digits", "test")
    seen = 0
    for index in range(40):
        other = edited(world, index, "motion")
        if other is not None and " then " not in other.factors.motion:
            np.testing.assert_array_equal(other.frames, world.sample(index).frames[::-1])
            seen += 1
    assert seen > 5


def test_boxes():
    assert aligned((8, 12, 32, 36), 8) == (0, 8, 40, 40)
    assert aligned((0, 1, 24, 64), 8) == (0, 0, 32, 64)
    with pytest.raises(ValueError, match="'size'; choose one of colour, class, motion"):
        edited(SpriteWorld("digits", "test"), 0, "size")
