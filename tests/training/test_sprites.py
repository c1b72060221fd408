"""The sprite world: identity of its samples, honest captions, disjoint splits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nuwa.training.sprites.bank import load_bank
from nuwa.training.sprites.world import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    DIRECTIONS,
    LEVELS,
    MOTIONS,
    REACH,
    SPLITS,
    SpriteWorld,
    novel_pairs,
)

# Changing a sample's content changes every published number: raise world.VERSION with these.
FIRST_50_TRAIN = {
    "digits": "6abdc8520dd1fc0779fcb653047ec93bff6b7926e1170e273135b99da2366cf3",
    "full": "879cee17348ce4c84d3754674e3f874bc7c2608040badb288b04c57c129783cf",
}


@pytest.mark.parametrize("level", LEVELS)
def test_first_train_clips_never_change(level):
    world, digest = SpriteWorld(level, "train"), hashlib.sha256()
    for index in range(50):
        sample = world.sample(index)
        digest.update(sample.frames.tobytes() + sample.segmentation.tobytes())
        digest.update(f"{sample.video_caption}\n{sample.image_caption}\n".encode())
    assert digest.hexdigest() == FIRST_50_TRAIN[level]


def test_sample_depends_on_seed_split_and_index_only():
    def key(*arguments, index=3):
        return SpriteWorld(*arguments).sample(index).frames.tobytes()

    assert key("full", "train") == key("full", "train", 0)
    others = [key("full", "train", 1), key("full", "val"), key("full", "train", index=4)]
    assert len({key("full", "train"), *others}) == 4


def test_shapes_and_captions():
    sample = SpriteWorld("digits", "train").sample(0)
    assert sample.frames.shape == (10, 64, 64, 3) and sample.frames.dtype == np.uint8
    assert sample.segmentation.shape == (10, 64, 64) and sample.segmentation.dtype == np.uint8
    assert sample.video_caption == "a red 3 on a black background moving up then down ."
    assert sample.image_caption == "a red 3 on a black background ."


def test_every_caption_of_the_full_level_occurs_and_names_its_factors():
    world, seen = SpriteWorld("full", "train"), {"colour": set(), "background": set()}
    pairs = set()
    for index in range(5000):
        factors = world.factors(index)
        words = factors.video_caption.split()
        assert words[1:4] == [factors.colour, CLASSES[factors.class_index], "on"]
        assert words[5] == factors.background and words[-1] == "."
        assert " ".join(words[8:-1]) == factors.motion
        assert words[0] == ("an" if factors.colour == "orange" else "a")
        seen["colour"].add(factors.colour)
        seen["background"].add(factors.background)
        pairs.add((factors.class_index, factors.motion))
    assert seen == {"colour": set(COLOURS), "background": set(BACKGROUNDS)}
    assert pairs == set(world.pairs) and len(pairs) == 20 * 8 - 20


@pytest.mark.parametrize("name", ["digits", "animals"])
def test_no_glyph_is_in_two_splits(name):
    contents = [
        {glyph.tobytes() for group in classes for glyph in group}
        for classes in load_bank(name).values()
    ]
    assert all(not a & b for i, a in enumerate(contents) for b in contents[i + 1 :])
    assert all(len(group) >= 30 for classes in load_bank(name).values() for group in classes)


@pytest.mark.parametrize("level", LEVELS)
def test_novel_pairs_occur_in_the_novel_split_only(level):
    for split in SPLITS:
        world = SpriteWorld(level, split)
        drawn = [world.factors(index) for index in range(3000)]
        novel = [(f.class_index, f.motion) in novel_pairs() for f in drawn]
        assert all(novel) if split == "novel" else not any(novel)
        assert {f.class_index for f in drawn} == set(range(world.class_count))
        assert {f.motion for f in drawn} == set(MOTIONS)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_sprite_moves_as_the_caption_says(level, split):
    world = SpriteWorld(level, split)
    for index in range(150):
        sample = world.sample(index)
        row_step, column_step = DIRECTIONS[sample.factors.motion.split()[0]]
        track = _top_left_corners(sample)
        moves = np.diff(track, axis=0)
        along = moves @ (row_step, column_step)
        assert not (moves @ (column_step, row_step)).any(), "it moves along one axis only"
        speed = abs(along[0])
        assert set(abs(along)) == {speed}, "the speed is constant"
        assert speed == 4 if level == "digits" else 2 <= speed <= 4
        if " then " in sample.factors.motion:
            turn = int((along > 0).sum())
            assert (along[:turn] > 0).all() and (along[turn:] < 0).all()
            assert turn in ((4, 5) if level == "digits" else (3, 4, 5, 6))
        else:
            assert (along > 0).all()


def _top_left_corners(sample):
    """Corner of the ink in every frame; the whole ink must be visible in all of them."""
    background = np.array(BACKGROUNDS[sample.factors.background])
    corners, crops = [], set()
    for frame in sample.frames:
        rows, columns = np.nonzero((frame != background).any(-1))
        top, left = rows.min(), columns.min()
        corners.append((int(top), int(left)))
        crops.add(frame[top : rows.max() + 1, left : columns.max() + 1].tobytes())
    assert len(crops) == 1, "a part of the sprite left the canvas"
    return np.array(corners)


def test_digits_level_keeps_to_the_lattice():
    world = SpriteWorld("digits", "train")
    corners = {world.plan(i).track.corner(f) for i in range(500) for f in range(10)}
    assert all(row % 4 == 0 and column % 4 == 0 for row, column in corners)
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(0, 41, 4))
    assert {world.factors(i).background for i in range(100)} == {"black"}
    assert {world.factors(i).colour for i in range(100)} == {"red", "green", "blue", "yellow"}


@pytest.mark.parametrize("level", LEVELS)
def test_long_clips_begin_as_the_clip_does_and_go_on_inside_the_canvas(level):
    world = SpriteWorld(level, "train")
    for index in range(40):
        sample = world.sample(index)
        frames, classes = world.long_clip(index, range(10))
        assert (frames == sample.frames).all() and (classes == sample.segmentation).all()
        track = world.plan(index).track
        corners = np.array([track.corner(f) for f in range(200)])
        assert corners.min() >= 0 and corners.max() <= REACH
        steps = np.diff(corners, axis=0)
        assert (np.abs(steps).sum(1) == track.speed).all(), "it never stands still"
        assert (steps.any(0)).sum() == 1, "it stays on its axis"
        assert len(np.unique(steps, axis=0)) == 2, "it turns"


@pytest.mark.parametrize("level", LEVELS)
def test_segmentation_marks_the_pixels_nearer_to_ink_than_to_background(level):
    world = SpriteWorld(level, "val")
    for index in range(40):
        sample = world.sample(index)
        marked = sample.segmentation > 0
        assert set(np.unique(sample.segmentation)) == {0, sample.factors.class_index + 1}
        background = np.array(BACKGROUNDS[sample.factors.background], float)
        colour = np.array(COLOURS[sample.factors.colour], float)
        axis = colour - background
        ink = (sample.frames - background) @ axis / (axis @ axis)
        assert ink[marked].min() > 0.49 and ink[~marked].max() < 0.51


def test_one_frame_equals_the_frame_of_the_clip():
    world = SpriteWorld("full", "test")
    sample = world.sample(11)
    frame, segmentation = world.frame(11, 7)
    assert np.array_equal(frame, sample.frames[7])
    assert np.array_equal(segmentation, sample.segmentation[7])


def test_colours_contrast_with_each_other_and_with_backgrounds():
    values = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distance = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert distance[~np.eye(len(values), dtype=bool)].min() > 80


def test_wrong_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'easy'.*digits, full"):
        SpriteWorld("easy", "train")
    with pytest.raises(ValueError, match="'valid'.*train, val, test, novel"):
        SpriteWorld("digits", "valid")
    with pytest.raises(ValueError, match="-1"):
        SpriteWorld("digits", "train").sample(-1)
