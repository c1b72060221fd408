"""The judge: stored one, saving and loading, and that training teaches it something."""

from __future__ import annotations

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


def test_an_empty_clip_has_no_class(stored):
    verdict = stored.read(np.zeros((10, 64, 64, 3), np.uint8))
    assert verdict.class_index == NO_CLASS
    assert verdict.colour == verdict.motion == "none" and not verdict.features.any()


def test_save_and_load_give_the_same_judge(stored, tmp_path):
    stored.save(tmp_path)
    again = Judge.load(tmp_path)
    assert again.level == stored.level and again.metadata == stored.metadata
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
