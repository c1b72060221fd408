"""Rollouts: clips that a model went on with, and training on windows of them."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from nuwa.spec.grid import Grid
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT
from nuwa.training import rollouts
from nuwa.training.batches import Batches, Rows
from nuwa.training.checkpoint import load_checkpoint
from nuwa.training.clips import ENDLESS, FreshClips, encode_frames
from nuwa.training.decode import generate
from nuwa.training.rollouts import Rollouts, load_rollouts
from nuwa.training.sources import Sprites, may_predict
from nuwa.training.sprites.world import novel_pairs, render_at
from nuwa.training.train_nuwa import NUWAOptions, NUWARecipe

from ..test_shipped import CHECKPOINT
from .test_nuwa import SMALL, model, text

FRAMES, LENGTH = 14, 10
ABOUT = {"bundle_hash": "0" * 64, "sampling": {"v2v": {"temperature": 0.1}}}


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def source():
    return Sprites("digits")


@pytest.fixture(scope="module")
def encode(checkpoint):
    return partial(encode_frames, checkpoint.vqgan)


@pytest.fixture(scope="module")
def generate_clips(source, encode):
    """A model that is right but for a stripe, and that loses the sprite in some clips."""
    clips = {}  # by the two frames that are given
    for number in range(8):
        index = int(np.random.default_rng((5, number)).integers(ENDLESS))
        clips[source.clip(index, range(2))[0].tobytes()] = source.clip(index, range(FRAMES))[0]

    def generate(task, prompt, frame_count, seed, frames, tokens):
        assert (task, frame_count, len(frames), tokens) == ("v2v", FRAMES, 2, True)
        made = clips[frames.tobytes()].copy()
        made[2:, 30] = made[2:, 29]
        if seed % 3 == 0:
            made[6:10] = 0  # one frame too many for the place to be known again
        return made, encode(made).astype(np.int32).reshape(-1, 8, 8)

    return generate


def collected(generate, out, **changes) -> dict:
    options = {
        "tasks": ["t2i", "v2v"],
        "split": "train",
        "samples": 5,
        "seed": 5,
        "out": out,
        "progress": lambda done, total: None,
        "concurrency": 2,
        "about": ABOUT,
        "frames": str(FRAMES),
    }
    return rollouts.collect(generate, **(options | changes))


@pytest.fixture(scope="module")
def made(generate_clips, source, encode, tmp_path_factory) -> Rollouts:
    out = tmp_path_factory.mktemp("rollouts")
    report = collected(generate_clips, out)
    found = load_rollouts(out / rollouts.FILE, source, encode)
    counts = {"windows": len(found.windows_W2), "faithful": len(found.faithful_W2)}
    assert report["tasks"]["v2v"]["scores"] == {"rollouts": 5} | counts
    return found


def test_a_volume_longer_than_the_configs_goes_on_in_any_order():
    nuwa, ids, seeds = model(SMALL), text(SMALL, 2), [1, 2]
    waves, raster, short = (
        generate(nuwa, ids, Grid(frames, 4, 4), seeds=seeds, kind=kind)
        for frames, kind in ((11, "wave"), (11, "raster"), (4, "wave"))
    )
    assert torch.equal(waves, raster)
    assert torch.equal(waves[:, :64], short)


def test_rollouts_are_what_was_made_and_where(made, generate_clips, source):
    assert made.tokens_RFC.shape == (5, FRAMES, 64)
    for r, index in enumerate(made.clip_R.tolist()):
        assert index == np.random.default_rng((5, r)).integers(ENDLESS)
        given = source.clip(index, range(2))[0]
        _, tokens = generate_clips("v2v", "", FRAMES, 5 + r, given, True)
        assert (made.tokens_RFC[r] == tokens.reshape(FRAMES, 64)).all()
        places = [source.world.plan(index).track.corner(frame) for frame in range(FRAMES)]
        there = np.arange(FRAMES) != (9 if (5 + r) % 3 == 0 else -1)
        assert (made.corners_RF2[r] == places)[there].all()
        starts = made.windows_W2[made.windows_W2[:, 0] == r, 1].tolist()
        right = [start for start in range(5) if there[start : start + LENGTH].all()]
        assert starts == [start for start in right if source.may_show(index, start)]
    assert len(made.windows_W2) > 4


def test_faithful_windows_show_what_was_there(made, source):
    """A stripe through the sprite is little, another shape is not, and what is gone is nothing."""
    there = made.corners_RF2.min(axis=2) >= 0
    assert (np.isfinite(made.snr_RF) == there).all()
    assert (made.snr_RF[:, :2] > 60).all(), "true frames"
    gone = (made.snr_RF < 1) & there
    assert gone.any(axis=1).tolist() == [(5 + r) % 3 == 0 for r in range(5)]
    windows = made.windows_W2.tolist()
    assert made.faithful_W2.tolist() == windows
    snr_RF = made.snr_RF.copy()
    first, start = windows[0]
    wrong = start + rollouts.SHOWN
    snr_RF[first, wrong] = rollouts.FAITHFUL - 1
    kept = [[r, s] for r, s in windows if r != first or not wrong - rollouts.SHOWN < s <= wrong]
    wronged = dataclasses.replace(made, snr_RF=snr_RF)
    assert wronged.faithful_W2.tolist() == kept
    assert len(kept) < len(windows)
    mending = [[r, s] for r, s in kept if r == first and s + LENGTH > wrong >= s]
    assert made.mending_W2.tolist() == [] and wronged.mending_W2.tolist() == mending != []
    draws = [wronged.window(np.random.default_rng(n), faithful=True)[1] for n in range(60)]
    mended = {wronged.tokens_RFC[r, s : s + LENGTH].tobytes() for r, s in mending}
    share = np.mean([each.astype(np.int16).tobytes() in mended for each in draws])
    assert 0.3 < share < 0.8

    index = one_way(source)
    plan = source.world.plan(index)
    other = dataclasses.replace(plan, glyph_TT=source.world.plan(index + 1).glyph_TT)
    corners = np.array([plan.track.corner(frame) for frame in range(FRAMES)], np.int16)
    places = [tuple(each) for each in corners.tolist()]
    changed, _ = render_at(other, places)
    assert (rollouts._snr(plan, corners, changed) < rollouts.FAITHFUL).all()


def test_more_rollouts_go_on_where_a_file_ends(made, generate_clips, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "CHUNK", 2)
    asked, told = [], []

    def counted(**request):
        asked.append(request["seed"])
        return generate_clips(**request)

    def progress(done, total):
        told.append((done, total))
        if done == 2 and total == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(counted, tmp_path, progress=progress)
    collected(counted, tmp_path, samples=5, progress=lambda *both: told.append(both))
    assert sorted(asked) == [5, 6, 7, 8, 9] and told == [(2, 5), (4, 5), (5, 5)]
    found = rollouts._read(tmp_path / rollouts.FILE)
    for field in dataclasses.fields(Rollouts)[1:]:
        assert np.array_equal(getattr(found, field.name), getattr(made, field.name))
    with pytest.raises(ValueError, match="rollouts of other settings; give another folder"):
        collected(counted, tmp_path, captioned="0.1")


def test_captions_are_those_of_images(generate_clips, source, tmp_path):
    prompts = []

    def generate(prompt, **request):
        prompts.append(prompt)
        return generate_clips(prompt=prompt, **request)

    collected(generate, tmp_path / "all", captioned="1")
    assert all(prompt.endswith("background .") for prompt in prompts)
    collected(generate, tmp_path / "none", captioned="0")
    assert prompts[5:] == [""] * 5


def one_way(source, frames: int = 10) -> int:
    """A clip that turns after so many frames, and whose windows may be predicted."""
    for index in range(1000):
        plan = source.world.plan(index)
        shown = [plan.shown_motion(start) for start in range(5)]
        if plan.track.first == frames and all(
            may_predict(plan.factors.class_index, s) for s in shown
        ):
            return index
    raise AssertionError("there is no such clip")


@pytest.mark.parametrize("level", ["digits", "full"])
def test_places_and_windows_are_those_of_the_sprite_as_it_was_moved(level):
    source = Sprites(level)
    index = one_way(source, 10 if level == "digits" else 9)
    plan = source.world.plan(index)
    real, _ = source.clip(index, range(FRAMES))
    places = np.array([plan.track.corner(frame) for frame in range(FRAMES)])
    assert (rollouts._own_corners(plan, real) == places).all()

    changed = dataclasses.replace(plan, glyph_TT=np.roll(plan.glyph_TT, 1, axis=0))
    moved, _ = render_at(changed, [tuple(place) for place in places.tolist()])
    assert (rollouts._own_corners(plan, moved) == places).all(), "another shape, a little aside"

    still = real.copy()
    still[5] = real[4]  # stops for a frame, which no sprite does
    assert (rollouts._own_corners(plan, still) == places).all(), "as it should have gone on"
    still[4:8] = 0  # no sprite at all, for too long
    found = rollouts._own_corners(plan, still)
    assert (found[7] == -1).all() and (np.delete(found, 7, 0) == np.delete(places, 7, 0)).all()
    assert list(rollouts._windows(plan, found)) == []


@pytest.mark.parametrize(
    ("seen", "path"),
    [
        ([8, 4, 0, 4, 8], [8, 4, 0, 4, 8]),
        ([8, 4, 0, -1, 0, 4], [8, 4, 0, 4, 0, 4]),  # beyond the end for a frame, and back
        ([32, 36, 40, -1, -1, -1, 36], [32, 36, 40, 36, 32, 28, -1]),
        ([32, 36, -1, 36, 32], [32, 36, 40, 36, 32]),
        ([8, 12, -1, -1, -1, -1, 32], [8, 12, 16, 20, 24, -1, 32]),
        ([-1, 4, 8], [-1, 4, 8]),
        ([4, -1, 8], [4, -1, 8]),  # which way is not known yet
        ([8, 12, 24, 28], [8, 12, 16, 20]),  # a leap
    ],
)
def test_where_a_sprite_should_have_gone(seen, path):
    assert rollouts._path(seen, 4) == path


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


def test_a_file_of_rollouts_is_for_its_own_clips_and_tokenizer(made, source, encode, tmp_path):
    path = tmp_path / "new" / "rollouts.npz"
    made.save(path)
    assert [each.name for each in path.parent.iterdir()] == ["rollouts.npz"]
    with pytest.raises(ValueError, match="this run trains on .*full"):
        load_rollouts(path, Sprites("full"), encode)
    with pytest.raises(
        ValueError, match="tokens of another VQ-GAN: of the true frames' tokens, 0%"
    ):
        load_rollouts(path, source, lambda frames: encode(frames) + 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"rollouts\.npz cannot be read as rollouts"):
        load_rollouts(path, source, encode)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": "10"}, r"frames 10 is not in \[11, 1000\]"),
        ({"frames": "many"}, "frames 'many' is not a number"),
        ({"captioned": "1.5"}, r"captioned 1.5 is not in \[0, 1\]"),
        ({"split": "test"}, "give --split train, not 'test'"),
        ({"tasks": ["t2i"]}, "need task v2v"),
        ({"out": None}, "a folder"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(generate_clips, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        collected(generate_clips, **({"out": tmp_path} | wrong))


def test_a_folder_that_cannot_be_is_found_before_anything_is_rolled_out(tmp_path):
    (tmp_path / "file").write_text("")

    def generate(**request):
        raise AssertionError("asked")

    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"{out} cannot be written to"):
            collected(generate, out)


def test_rollouts_that_cannot_be_written_leave_those_of_before(made, tmp_path, monkeypatch):
    path = tmp_path / rollouts.FILE
    made.save(path)
    before = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(KeyboardInterrupt):
        made.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


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
        faithful = made.faithful_W2.tolist()
        rollout, start = windows[fed[row].astype(np.int16).tobytes()]
        index = int(made.clip_R[rollout])
        places = [tuple(place) for place in made.corners_RF2[rollout, start:][:LENGTH].tolist()]
        true, _ = render_at(source.world.plan(index), places)
        assert (target[row] == encode_frames(checkpoint.vqgan, true)).all()
        named = batch.prompts[row] != UNCONDITIONAL_PROMPT
        assert not named or batch.prompts[row] == source.caption(index, video=False)
        assert named or [rollout, start] in faithful
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
