"""Rollouts: clips that a model went on with, and training on windows of them."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from nuwa.spec.grid import Grid
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT
from nuwa.training import rollouts
from nuwa.training.batches import Batches, Rows
from nuwa.training.checkpoint import load_checkpoint
from nuwa.training.clips import FreshClips, encode_frames
from nuwa.training.decode import generate
from nuwa.training.rollouts import Rollouts, joined, load_rollouts, roll_out
from nuwa.training.sources import Sprites, may_predict
from nuwa.training.sprites.world import novel_pairs, render_at
from nuwa.training.train_nuwa import NUWAOptions, NUWARecipe

from ..test_shipped import CHECKPOINT
from .test_nuwa import SMALL, model, text

FRAMES, LENGTH = 14, 10


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def source():
    return Sprites("digits")


@pytest.fixture(scope="module")
def made(checkpoint, source) -> Rollouts:
    patch = pytest.MonkeyPatch()
    patch.setattr(rollouts, "BATCH", 3)
    parts = list(roll_out(checkpoint, source, clips=5, frames=FRAMES))
    patch.undo()
    assert [len(part.clip_R) for part in parts] == [3, 2]
    return joined(parts)


def test_a_volume_longer_than_the_configs_goes_on_in_any_order():
    nuwa, ids, seeds = model(SMALL), text(SMALL, 2), [1, 2]
    waves, raster, short = (
        generate(nuwa, ids, Grid(frames, 4, 4), seeds=seeds, kind=kind)
        for frames, kind in ((11, "wave"), (11, "raster"), (4, "wave"))
    )
    assert torch.equal(waves, raster)
    assert torch.equal(waves[:, :64], short)


def test_rollouts_go_on_from_true_frames(made, checkpoint, source):
    assert made.tokens_RFC.shape == (5, FRAMES, 64)
    for r, index in enumerate(made.clip_R.tolist()):
        true = encode_frames(checkpoint.vqgan, source.clip(index, range(FRAMES))[0])
        assert (made.tokens_RFC[r, :2] == true[:2]).all()
        assert 0.4 < (made.tokens_RFC[r, 2:] == true[2:]).mean() < 1.0
    assert (made.windows_W2 >= 0).all() and (made.windows_W2 <= (4, FRAMES - LENGTH)).all()
    assert len(np.unique(made.windows_W2, axis=0)) == len(made.windows_W2) > 4
    again = next(iter(roll_out(checkpoint, source, clips=1, frames=FRAMES)))
    assert (again.tokens_RFC[0] == made.tokens_RFC[0]).mean() > 0.95, "whatever the batch"


def one_way(source) -> int:
    """A clip that leaves room for another frame, and that may be predicted."""
    for index in range(1000):
        plan = source.world.plan(index)
        shown = [plan.shown_motion(start) for start in range(5)]
        if plan.track.first == 10 and all(may_predict(plan.factors.class_index, s) for s in shown):
            return index
    raise AssertionError("there is no such clip")


@pytest.mark.parametrize("level", ["digits", "full"])
def test_places_and_windows_are_those_of_the_sprite_as_it_was_moved(level):
    source = Sprites(level)
    index = one_way(source) if level == "digits" else 4
    plan = source.world.plan(index)
    real, _ = source.clip(index, range(FRAMES))
    places = np.array([plan.track.corner(frame) for frame in range(FRAMES)])
    assert (rollouts._own_corners(plan, real) == places).all()

    changed = dataclasses.replace(plan, glyph_TT=np.roll(plan.glyph_TT, 1, axis=0))
    moved, _ = render_at(changed, [tuple(place) for place in places.tolist()])
    assert (rollouts._own_corners(plan, moved) == places).all(), "another shape, a little aside"

    still = real.copy()
    still[5] = real[4]  # stops for a frame, which no sprite does
    found = rollouts._own_corners(plan, still)
    assert (np.delete(found, 5, 0) == np.delete(places, 5, 0)).all()
    assert list(rollouts._windows(plan, found)) == []
    still[5] = 0  # no sprite at all
    assert (rollouts._own_corners(plan, still)[5] == -1).all()


def test_windows_begin_where_the_sprite_moves_as_it_may(source):
    plan = source.world.plan(one_way(source))
    places = np.array([plan.track.corner(frame) for frame in range(FRAMES)], np.int16)
    assert list(rollouts._windows(plan, places)) == [0, 1, 2, 3, 4]
    early = np.concatenate([places[:5], places[3::-1], places[1:6]])  # its own turns, out and back
    assert len(early) == FRAMES
    assert list(rollouts._windows(plan, early)) == [0, 1, 2, 3, 4]
    trembles = np.concatenate([places[:2]] * (FRAMES // 2))
    assert list(rollouts._windows(plan, trembles)) == []
    gone = places.copy()
    gone[2] = -1
    assert list(rollouts._windows(plan, gone)) == [3, 4]
    class_index, _ = next(pair for pair in sorted(novel_pairs()) if pair[1] == "left")
    kept = dataclasses.replace(plan.factors, class_index=class_index)
    ways = np.array([(8, 40 - 4 * step) for step in range(10)], np.int16)
    assert list(rollouts._windows(dataclasses.replace(plan, factors=kept), ways)) == []
    assert list(rollouts._windows(plan, ways)) == [0]


def test_a_file_of_rollouts_is_for_its_own_clips_and_tokenizer(made, checkpoint, source, tmp_path):
    path = tmp_path / "new" / "rollouts.npz"
    made.save(path)
    loaded = load_rollouts(path, source, checkpoint.vqgan)
    assert loaded.world is source.world
    for field in dataclasses.fields(Rollouts)[1:]:
        assert np.array_equal(getattr(loaded, field.name), getattr(made, field.name))
    assert [each.name for each in path.parent.iterdir()] == ["rollouts.npz"]
    other = copy.deepcopy(checkpoint.vqgan)
    for parameter in other.parameters():
        parameter.data += 1e-6 * parameter.data  # as before it was stored in fp16
    load_rollouts(path, source, other)
    other.quantize.embedding.weight.data[0] += 1.0
    with pytest.raises(ValueError, match="rollouts of another tokenizer than this run"):
        load_rollouts(path, source, other)
    with pytest.raises(ValueError, match="rollouts of another source than this run"):
        load_rollouts(path, Sprites("full"), checkpoint.vqgan)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"rollouts\.npz cannot be read as rollouts"):
        load_rollouts(path, source, checkpoint.vqgan)


def test_what_cannot_be_rolled_out_is_refused(checkpoint, source):
    for wrong, message in (
        ({"frames": 10}, r"frames 10 are not in \[11, 1000\]"),
        ({"captioned": 1.5}, r"captioned 1.5 is not in \[0, 1\]"),
        ({"temperature": -1.0}, r"temperature -1.0 is not in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            list(roll_out(checkpoint, source, clips=1, **({"frames": 20} | wrong)))


def test_rolled_rows_are_fed_what_was_made_and_predict_what_is_true(made, checkpoint, source):
    config, clips = checkpoint.config, FreshClips(checkpoint.vqgan, source)
    batches = Batches(config, clips, checkpoint.vqgan, made)
    rows = Rows(text=8, none=1.0, anywhere=1.0, rolled=1.0, named=0.5)
    batch = batches.videos(np.random.default_rng(0), rows)
    fed, target = (each.view(8, LENGTH, 64).numpy() for each in (batch.fed_BN, batch.target_BN))
    kinds = set()
    for row in range(8):
        windows = {
            made.tokens_RFC[r, start : start + LENGTH].tobytes(): (r, start)
            for r, start in made.windows_W2.tolist()
        }
        rollout, start = windows[fed[row].astype(np.int16).tobytes()]
        index = int(made.clip_R[rollout])
        places = [tuple(place) for place in made.corners_RF2[rollout, start:][:LENGTH].tolist()]
        true, _ = render_at(source.world.plan(index), places)
        assert (target[row] == encode_frames(checkpoint.vqgan, true)).all()
        named = batch.prompts[row] != UNCONDITIONAL_PROMPT
        assert not named or batch.prompts[row] == source.caption(index, video=False)
        kinds.add(named)
    assert kinds == {True, False}
    weight = batch.weight_BN.view(8, LENGTH, 64)
    assert not weight[:, 0].any() and weight[:, 1:].all()
    none = dataclasses.replace(rows, rolled=0.0)
    batch = batches.videos(np.random.default_rng(0), none)
    assert torch.equal(batch.fed_BN, batch.target_BN)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rollouts_and_their_share_go_together(made, checkpoint, source, share):
    options = NUWAOptions(images=2, clips=2, rolled_clips=share)
    clips = FreshClips(checkpoint.vqgan, source)
    parts = (checkpoint.config, options, checkpoint.vqgan, checkpoint.text_tokenizer, clips)
    with pytest.raises(ValueError, match="rolled_clips .above 0. and rollouts go together"):
        NUWARecipe(*parts, rollouts=None if share else made)
    empty = dataclasses.replace(made, windows_W2=made.windows_W2[:0])
    if share:
        with pytest.raises(ValueError, match="no window to train on"):
            NUWARecipe(*parts, rollouts=empty)
