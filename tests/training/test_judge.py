"""The judge: stored one, saving and loading, and that training teaches it something."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from nuwa.training.judge import NO_CLASS, Judge
from nuwa.training.readers import locate
from nuwa.training.sprites.world import SpriteWorld
from nuwa.training.train_judge import accuracy, train_judge

STORED = Path(__file__).parents[2] / "checkpoints" / "judge-digits"


@pytest.fixture(scope="module")
def stored() -> Judge:
    return Judge.load(STORED)


@pytest.mark.parametrize("split", ["test", "novel"])
def test_stored_judge_reads_held_out_clips(stored, split):
    scores = accuracy(stored, split, 150)
    assert scores["class"] >= 0.96
    assert min(scores["colour"], scores["background"], scores["motion"]) == 1.0


def test_class_does_not_depend_on_colour_or_place(stored):
    world = SpriteWorld("digits", "test")
    for index in range(20):
        frames = world.sample(index).frames
        shown = stored.read(frames)
        assert stored.read(frames[..., ::-1].copy()).class_index == shown.class_index
        shift = 4 if locate(frames).track_F2[0, 0] < 32 else -4  # away from the edge
        moved = stored.read(np.roll(frames[:1], shift, axis=1))
        assert moved.features == pytest.approx(stored.read(frames[:1]).features, abs=1e-4)


def test_many_clips_are_read_as_one_by_one(stored):
    samples = [SpriteWorld("digits", "test").sample(index) for index in range(4)]
    clips = [samples[0].frames, samples[1].frames[:1], np.zeros((3, 64, 64, 3), np.uint8)]
    clips += [samples[2].frames[2:], samples[3].frames]
    for clip, verdict in zip(clips, stored.read_many(clips), strict=True):
        alone = stored.read(clip)
        assert verdict.class_index == alone.class_index and verdict.motion == alone.motion
        np.testing.assert_allclose(verdict.features_FD, alone.features_FD, atol=1e-4)


def test_clip_features_see_shape_change_and_steps(stored):
    world = SpriteWorld("digits", "test")
    one_way = next(i for i in range(99) if " then " not in world.factors(i).motion)
    frames = world.sample(one_way).frames
    moving, still = stored.read(frames).clip_features, stored.read(frames[[0] * 10]).clip_features
    assert moving.shape == (64 + 64 + 18,)
    assert np.abs(moving[-18:]).sum() == pytest.approx(9 * 4, abs=1)  # 4 pixels a frame
    assert np.abs(still[64:]).max() < 1e-6  # sums over a batch round
    backwards = stored.read(frames[::-1]).clip_features
    np.testing.assert_allclose(backwards[:64], moving[:64], atol=1e-4)
    assert np.abs(backwards[-18:] - moving[-18:]).sum() > 20


@pytest.mark.parametrize("split", ["test", "novel"])
def test_every_frame_of_a_real_clip_shows_a_sprite(stored, split):
    world = SpriteWorld("digits", split)
    for verdict in stored.read_many([world.sample(index).frames for index in range(100)]):
        assert verdict.seen == 1.0 and NO_CLASS not in verdict.classes_F


def test_a_sprite_that_vanishes_is_not_seen(stored):
    frames = SpriteWorld("digits", "test").sample(0).frames.copy()
    before = stored.read(frames)
    frames[3:] = 0
    verdict = stored.read(frames)
    assert verdict.class_index == before.class_index, "of what is left of it"
    assert verdict.seen == pytest.approx(0.3)
    assert (verdict.classes_F[:3] == before.class_index).all()
    assert (verdict.classes_F[3:] == NO_CLASS).all()


def test_each_frame_has_a_class_of_its_own(stored):
    world = SpriteWorld("digits", "test")
    one = world.sample(0)
    class_index = one.factors.class_index
    other = next(s for s in map(world.sample, range(99)) if s.factors.class_index != class_index)
    verdict = stored.read(np.concatenate([one.frames[:7], other.frames[7:]]))
    expected = [class_index] * 7 + [other.factors.class_index] * 3
    assert verdict.classes_F.tolist() == expected


def test_an_empty_clip_has_no_class(stored):
    verdict = stored.read(np.zeros((10, 64, 64, 3), np.uint8))
    assert verdict.class_index == NO_CLASS and verdict.seen == 0.0
    assert (verdict.classes_F == NO_CLASS).all()
    assert verdict.colour == verdict.motion == "none" and not verdict.features.any()


def test_save_and_load_give_the_same_judge(stored, tmp_path):
    stored.save(tmp_path)
    again = Judge.load(tmp_path)
    assert again.level == stored.level and again.metadata == stored.metadata
    digest = hashlib.sha256((STORED / "judge.safetensors").read_bytes()).hexdigest()
    assert stored.source == {"folder": "judge-digits", "weights_sha256": digest}
    frames = SpriteWorld("digits", "val").sample(0).frames
    assert np.array_equal(again.read(frames).features, stored.read(frames).features)


def test_a_judge_of_another_world_is_refused(stored, tmp_path):
    stored.save(tmp_path)
    metadata = json.loads((tmp_path / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps(metadata | {"world_version": 0}))
    with pytest.raises(ValueError, match="version 0 of the sprite world"):
        Judge.load(tmp_path)


def test_short_training_learns_far_more_than_chance():
    losses = []
    judge = train_judge(
        "digits", steps=40, batch=48, progress=lambda step, steps, loss: losses.append(loss)
    )
    assert len(losses) == 40 and losses[-1] < losses[0]
    assert accuracy(judge, "val", 60)["class"] > 0.4
