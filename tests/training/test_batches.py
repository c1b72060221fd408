"""Batches of multi-task training: what is fed, predicted, hidden and shown, row by row."""

import dataclasses

import numpy as np
import pytest
import torch

from nuwa.spec.config import ModelConfig, VisualConfig, preset
from nuwa.spec.known import blank_hidden, known_cells
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT
from nuwa.training.batches import NEAR, Batches, Rows, cutting_halves, draw_mask, halves, near_codes
from nuwa.training.clips import FreshClips, encode_frames, store_clips
from nuwa.training.readers import locate, read_motion
from nuwa.training.sources import Sprites
from nuwa.training.sprites.bank import TILE
from nuwa.training.sprites.world import CLASSES, COLOURS, novel_pairs
from nuwa.training.vqgan import VQGAN

from .tiny import TINY_VQGAN

IMAGE = dataclasses.replace(TINY_VQGAN, codebook_size=64)
SKETCH = dataclasses.replace(IMAGE, channels=21, codebook_size=32)
CONFIG: ModelConfig = dataclasses.replace(
    preset("sprites"),
    image=IMAGE,
    sketch=SKETCH,
    visual=VisualConfig(layers=1, heads=4, ff_multiplier=1),
)
CLIPS = 4


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> Batches:
    torch.manual_seed(0)
    pictures, sketches = VQGAN(IMAGE).eval(), VQGAN(SKETCH).eval()
    for model in (pictures, sketches):
        torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    cache = tmp_path_factory.mktemp("clips") / "clips.npy"
    clips = store_clips(pictures, Sprites("digits"), CLIPS, cache, sketch_vqgan=sketches)
    return Batches(CONFIG, clips, pictures)


def test_each_kind_of_row_is_fed_and_shown_what_its_task_says(batches):
    rows = Rows(text=5, sketches=4, hidden=6, none=0.0)
    batch = batches.images(np.random.default_rng(1), rows)
    assert batch.fed_BN.shape == (15, 64)
    assert batch.visual_VN.shape == (10, 64)
    sketch, hidden, text = slice(0, 4), slice(4, 10), slice(10, 15)
    K, unknown = IMAGE.codebook_size, CONFIG.hidden
    assert batch.visual_VN[sketch].min() >= K
    assert batch.visual_VN[sketch].max() < unknown == K + SKETCH.codebook_size
    for part in (sketch, text):
        assert torch.equal(batch.fed_BN[part], batch.target_BN[part])
        assert (batch.weight_BN[part] == 1).all()
    known = batch.weight_BN[hidden] == 0
    assert known.any() and not known.all()
    shown = batch.visual_VN[hidden]
    assert torch.equal(shown[known], batch.fed_BN[hidden][known])
    assert ((shown[~known] >= unknown) & (shown[~known] < CONFIG.visual_ids)).all()
    assert torch.equal(batch.fed_BN[hidden][~known], batch.target_BN[hidden][~known])
    captions = {batches.clips.source.caption(i, video=False) for i in range(CLIPS)}
    assert set(batch.prompts[10:]) <= captions
    assert set(batch.prompts[4:10]) <= captions | {UNCONDITIONAL_PROMPT}


def test_a_clips_hidden_part_is_the_same_in_all_its_frames(batches):
    batch = batches.videos(np.random.default_rng(2), Rows(text=1, hidden=3, none=0.0))
    weight = batch.weight_BN[:3].view(3, 10, 64)
    assert (weight == weight[:, :1]).all()
    assert batch.time_B is None
    assert "moving" in batch.prompts[3]


def test_unconditional_clips_come_from_any_time(batches):
    batch = batches.videos(np.random.default_rng(3), Rows(text=24, none=1.0))
    assert set(batch.prompts) == {UNCONDITIONAL_PROMPT}
    weight = batch.weight_BN.view(24, 10, 64)
    anywhere = weight[:, 0, 0] == 0
    assert 4 < int(anywhere.sum()) < 20
    assert (weight[:, 1:] == 1).all()
    assert (batch.time_B[~anywhere] == 0).all()
    assert len(batch.time_B[anywhere].unique()) > 2
    assert batch.time_B.max() < CONFIG.decoder.grid.frames


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_how_many_unconditional_clips_come_from_anywhere_is_said(batches, share):
    rows = Rows(text=6, none=1.0, anywhere=share)
    batch = batches.videos(np.random.default_rng(4), rows)
    first = batch.weight_BN.view(6, 10, 64)[:, 0]
    assert (first == 1.0 - share).all()
    assert (batch.time_B is None) == (share == 0.0)


def test_steady_clips_are_chosen_among_those_that_begin_at_their_start(batches):
    source, first = batches.clips.source, {}
    for index in range(CLIPS):
        first[batches.clips.codes([(index, range(10))]).tobytes()] = source.steady(index)
    assert set(first.values()) == {False, True}
    for share, wanted in ((1.0, {True}), (0.0, {False, True})):
        rows = Rows(text=16, none=1.0, anywhere=0.0, steady=share)
        batch = batches.videos(np.random.default_rng(5), rows)
        assert {first[row.numpy().tobytes()] for row in batch.target_BN} == wanted
    captioned = Rows(text=16, none=0.0, anywhere=0.0, steady=1.0)
    batch = batches.videos(np.random.default_rng(5), captioned)
    assert {first[row.numpy().tobytes()] for row in batch.target_BN} == {False, True}


def test_the_models_own_tokens_are_fed_after_the_first_frame_of_clips_without_a_caption(batches):
    rows = Rows(text=24, hidden=2, sketches=2, none=0.7, own=0.8)
    batch = batches.videos(np.random.default_rng(6), rows)
    none = np.array([prompt == UNCONDITIONAL_PROMPT for prompt in batch.prompts])
    none[:4] = False  # pictures and sketches are given there
    own = batch.own_BN.view(28, 10, 64).numpy()
    shares = own[none, 1:].mean((1, 2))
    assert not own[~none].any() and not own[:, 0].any()
    assert shares.min() < 0.3 < 0.5 < shares.max() < 0.85, "each row has a share of its own"
    for rows in (Rows(text=3, none=1.0), Rows(text=3, none=0.0, own=1.0)):
        assert batches.videos(np.random.default_rng(7), rows).own_BN is None
    assert batches.images(np.random.default_rng(7), Rows(text=3, none=1.0, own=1.0)).own_BN is None


def test_near_codes_are_the_nearest_others():
    weight = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert near_codes(weight, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert near_codes(weight, 9).shape == (4, 3)


def test_mistaken_tokens_are_fed_but_not_learnt_in_clips_without_a_caption(batches):
    rows = Rows(text=40, hidden=2, sketches=2, none=0.7, anywhere=0.5)
    true = batches.videos(np.random.default_rng(9), rows)
    rows = dataclasses.replace(rows, mistaken=0.6)
    batch = batches.videos(np.random.default_rng(9), rows)
    assert torch.equal(batch.target_BN, true.target_BN) and batch.prompts == true.prompts
    assert torch.equal(batch.weight_BN, true.weight_BN)
    fed, meant = (t.view(44, 10, 64).numpy() for t in (batch.fed_BN, true.fed_BN))
    wrong = fed != meant
    near = near_codes(batches.vqgan.quantize.embedding.weight, NEAR)
    assert (near[meant[wrong]] == fed[wrong][:, None]).any(1).all()
    none = np.array([prompt == UNCONDITIONAL_PROMPT for prompt in batch.prompts])
    none[:4] = False
    anywhere = (batch.weight_BN[:, 0] == 0).numpy() & none
    shares = wrong[none, 1:].mean((1, 2))
    assert not wrong[~none].any() and not wrong[none & ~anywhere][:, 0].any()
    assert wrong[anywhere][:, 0].any(), "there even the first frame was made"
    assert shares.min() < 0.1 < 0.4 < shares.max() < 0.65, "each row has a share of its own"


def test_windows_may_be_named_by_the_caption_of_an_image(batches):
    source = batches.clips.source
    names = {source.caption(i, video=False) for i in range(CLIPS)}
    rows = Rows(text=40, none=0.8, anywhere=0.5, named=0.5)
    batch = batches.videos(np.random.default_rng(8), rows)
    anywhere = batch.weight_BN[:, 0] == 0
    kinds = [
        "none" if prompt == UNCONDITIONAL_PROMPT else "image" if prompt in names else "video"
        for prompt in batch.prompts
    ]
    assert {kind for kind, there in zip(kinds, anywhere, strict=True) if there} == {"none", "image"}
    rest = {kind for kind, there in zip(kinds, anywhere, strict=True) if not there}
    assert rest == {"none", "video"}


@pytest.mark.parametrize("anywhere", [0.0, 1.0])
def test_strange_clips_show_what_no_caption_names(batches, anywhere, monkeypatch):
    source, asked = batches.clips.source, {}

    def stranger(index, frames):
        pixels = Sprites.stranger(source, index, frames)
        asked[encode_frames(batches.vqgan, pixels).astype(np.int64).tobytes()] = frames.start
        return pixels

    monkeypatch.setattr(source, "stranger", stranger)
    rows = Rows(text=24, hidden=2, none=0.8, anywhere=anywhere, named=0.3, strange=0.7)
    batch = batches.videos(np.random.default_rng(11), rows)
    strange = np.array([row.numpy().tobytes() in asked for row in batch.target_BN])
    none = np.array([prompt == UNCONDITIONAL_PROMPT for prompt in batch.prompts])
    none[:2] = False  # a picture is given there
    assert not strange[~none].any() and 0 < strange.sum() < none.sum()
    assert torch.equal(batch.fed_BN[strange], batch.target_BN[strange])
    assert (batch.weight_BN[strange, 0] == 0).all() and (batch.weight_BN[strange, -1] == 1).all()
    assert (max(asked.values()) > 0) == bool(anywhere)


def test_a_stranger_moves_as_the_clip_does_and_is_a_glyph_on_its_side():
    source = Sprites("digits")
    names = set()
    for colour, ink in ((name, max(COLOURS[name])) for name in source.world.colours):
        upright = {
            ((ink * glyph.astype(int) + 127) // 255).astype(np.uint8).tobytes(): CLASSES[index]
            for index, glyphs in enumerate(source.world.glyphs)
            for glyph in glyphs
        }
        for index in [i for i in range(60) if source.world.factors(i).colour == colour]:
            plan = source.world.plan(index)
            made = source.stranger(index, range(12))
            shown = made.max(axis=-1)
            tiles = []
            for frame in range(12):
                row, column = plan.track.corner(frame)
                tiles.append(shown[frame, row : row + TILE, column : column + TILE].copy())
                shown[frame, row : row + TILE, column : column + TILE] = 0
            assert not shown.any() and all((tile == tiles[0]).all() for tile in tiles)
            assert (made == source.stranger(index, range(12))).all()
            assert tiles[0].tobytes() not in upright
            sides = [np.rot90(tiles[0], turns)[::flip] for turns in (1, 3) for flip in (1, -1)]
            (name,) = {upright[each.tobytes()] for each in sides if each.tobytes() in upright}
            names.add(name)
    assert names == set("2345679")


def test_no_window_of_a_long_clip_shows_what_is_kept_for_the_novel_split():
    source, novel, barred = Sprites("digits"), novel_pairs(), 0
    for index in range(40):
        plan = source.world.plan(index)
        assert plan.shown_motion(0) == plan.factors.motion
        for start in range(0, 40, 3):
            frames, _ = source.clip(index, range(start, start + 10))
            shown = read_motion(locate(frames).track_F2)
            if (plan.factors.class_index, shown) in novel:
                assert not source.may_show(index, start)
                barred += 1
    assert barred > 10


def test_no_window_turns_where_its_class_going_on_is_kept_for_the_novel_split():
    source, novel, barred = Sprites("digits"), novel_pairs(), 0
    for index in range(200):
        factors = source.world.factors(index)
        first = factors.motion.split()[0]
        misleading = first != factors.motion and (factors.class_index, first) in novel
        assert source.may_show(index, 0) != misleading
        barred += misleading
    assert 4 < barred < 40


def test_clips_that_may_mislead_are_not_predicted_but_still_told_of(batches):
    source = batches.clips.source
    clips = FreshClips(batches.vqgan, source)
    draws = Batches(CONFIG, clips, batches.vqgan)
    shown = {0.0: [], 1.0: []}
    for none, found in shown.items():
        asked = []
        clips.codes = lambda spans, asked=asked: (  # noqa: E731
            asked.extend(index for index, _ in spans) or np.zeros((len(spans), 10, 64), np.int64)
        )
        draws.videos(np.random.default_rng(9), Rows(text=150, none=none, anywhere=0.0))
        found += [source.may_show(index, 0) for index in asked]
    assert all(shown[1.0]) and not all(shown[0.0])


def test_nothing_hidden_shows_in_the_known_tokens(batches):
    """Two pictures that differ in the hidden part alone give the same known tokens."""
    frames, _ = batches.clips.source.clip(0, range(1))
    mask = np.zeros((64, 64), bool)
    mask[17:40, 10:50] = True
    known = known_cells(mask, 8, 8)[None]
    assert not known[0, 2:5, 1:7].any()
    assert known.sum() == 64 - 18
    noisy = frames.copy()
    noisy[:, mask] = np.random.default_rng(0).integers(0, 256, noisy[:, mask].shape)
    codes = [encode_frames(batches.vqgan, blank_hidden(f, known)) for f in (frames, noisy)]
    assert (codes[0] == codes[1]).all()
    raw = [encode_frames(batches.vqgan, f)[known.reshape(1, -1)] for f in (frames, noisy)]
    assert (raw[0] != raw[1]).any(), "without blanking they would differ"


def test_halves_that_cut_through_the_object(batches):
    """All hidden rows of a batch: a half is hidden, with some of the sprite and not all of it."""
    batch = batches.images(np.random.default_rng(3), Rows(text=1, hidden=12, cut=1.0))
    hidden = (batch.weight_BN[:12] == 1).view(12, 8, 8)
    for mask in hidden.numpy():
        assert mask.sum() == 32 and any((mask == half).all() for half in halves(8, 8))
    assert batch.prompts[:12] == [UNCONDITIONAL_PROMPT] * 12
    inside = np.zeros((64, 64), bool)
    inside[20:40, 10:20] = True
    (upper, lower) = cutting_halves(inside)
    assert upper[:32].all() and not upper[32:].any(), "hides 12 rows of 20"
    assert lower[32:].all() and not lower[:32].any(), "hides 8"
    inside[20:28] = False
    assert [each.sum() for each in cutting_halves(inside)] == [64 * 32], "the upper hides a third"
    assert not cutting_halves(np.zeros((64, 64), bool))


def test_masks_are_halves_boxes_and_boxes_around_the_object():
    draw, inside = np.random.default_rng(0), np.zeros((64, 64), bool)
    inside[20:30, 33:50] = True
    shares, whole_patches = [], []
    for _ in range(300):
        mask = draw_mask(draw, inside, 8)
        assert mask.any()
        rows, columns = mask.any(1), mask.any(0)
        assert (mask == rows[:, None] & columns).all(), "a mask is a rectangle"
        edges = [np.flatnonzero(each)[[0, -1]] + (0, 1) for each in (rows, columns)]
        whole_patches.append(not (np.concatenate(edges) % 8).any())
        shares.append((mask.mean(), mask[inside].all()))
    share, whole = map(np.array, zip(*shares, strict=True))
    assert 0.2 < (share == 0.5).mean() < 0.5
    assert whole.mean() > 0.4
    assert 0.5 < np.mean(whole_patches) < 0.8
