"""Completion, prediction and manipulation: what is given stays, and changes what is made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.given import SEAM, known_positions, restore_given
from nuwa.spec.grid import Grid
from nuwa.spec.known import blank_hidden
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .engine_run import PROMPT, admit, alone, finish, step, tiny_engine

SIZE, CELLS = 16, 4  # pixels and tokens of a side; a patch is 4 x 4 pixels
EDITS = (Task.I2I, Task.TI2I, Task.TV2V)
SEEDS = range(5)


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return tiny_engine(tiny_bundle, slots=2)


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top:bottom, left:right] = True
    return mask


def predict(clip: np.ndarray, given: int, **fields) -> GenerationRequest:
    return GenerationRequest(Task.V2V, frame_count=len(clip), frames=clip[:given], **fields)


def edit(task: Task, clip: np.ndarray, mask: np.ndarray, **fields) -> GenerationRequest:
    frames = clip if task.is_video else clip[:1]
    prompt = PROMPT if task.needs_text else ""
    return GenerationRequest(
        task, prompt, frame_count=len(frames), frames=frames, mask=mask, **fields
    )


def picture(engine, request: GenerationRequest, tokens: np.ndarray) -> np.ndarray:
    """u8 [F, H, W, 3], as a scheduler makes them."""
    made = engine.pixels(tokens)
    return np.stack([restore_given(request, index, each) for index, each in enumerate(made)])


@pytest.mark.parametrize("given", [1, 2])
def test_prediction_keeps_the_given_frames(engine, clip, given):
    codes = engine._backend.tokenize(clip)
    made = {}
    for seed in SEEDS:
        request = predict(clip, given, seed=seed)
        run = alone(engine, request)
        assert (run.tokens[:given] == codes[:given]).all()
        pixels = picture(engine, request, run.tokens)
        assert (pixels[:given] == clip[:given]).all()
        assert (pixels[given:] == engine.pixels(run.tokens)[given:]).all()
        made[seed] = run.tokens[given:].tobytes()
    assert len(set(made.values())) == len(made), "each seed predicts something else"


def test_given_frames_change_the_prediction_and_save_steps(engine, clip):
    run = alone(engine, predict(clip, 2, seed=1))
    other = alone(engine, predict(255 - clip, 2, seed=1))
    assert (run.tokens[2] != other.tokens[2]).any()
    free = alone(engine, GenerationRequest(Task.T2V, "none", frame_count=3, seed=1))
    assert run.steps < free.steps
    assert 0 < run.prefills < run.steps and free.prefills == 0


@pytest.mark.parametrize("schedule", ["wave", "raster"])
def test_predicting_what_would_be_generated_anyway(engine, monkeypatch, schedule):
    """With the frames that "none" gives as given ones, the others come out as they did."""
    for seed in SEEDS:
        free = alone(engine, GenerationRequest(Task.T2V, "none", frame_count=3, seed=seed)).tokens

        def tokenize(frames, *, busy, free=free):
            return free[: len(frames)]

        monkeypatch.setattr(engine._backend, "tokenize", tokenize)
        for given in (1, 2):
            blank = np.zeros((3, SIZE, SIZE, 3), np.uint8)
            run = alone(engine, predict(blank, given, seed=seed, schedule=schedule))
            assert (run.tokens == free).all()


def test_a_caption_leads_the_prediction(engine, clip):
    plain = alone(engine, predict(clip, 1, seed=3)).tokens
    named = alone(engine, predict(clip, 1, seed=3, prompt="none")).tokens
    told = alone(engine, predict(clip, 1, seed=3, prompt=PROMPT)).tokens
    assert (plain == named).all() and (plain != told).any()


@pytest.mark.parametrize("task", EDITS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_edits_keep_all_that_lies_outside_the_mask(engine, clip, task, guidance):
    mask = box(5, 0, 14, 9)  # rows 1 to 3 and columns 0 to 2 of the token grid
    touched = np.zeros((CELLS, CELLS), bool)
    touched[1:4, 0:3] = True
    frames = edit(task, clip, mask).frames
    known = np.broadcast_to(~touched, (len(frames), CELLS, CELLS))
    codes = engine._backend.tokenize(blank_hidden(frames, known))
    deep = np.zeros_like(mask)
    deep[5 + SEAM : 14 - SEAM, : 9 - SEAM] = True  # the mask lies at the left edge
    changed = False
    for seed in SEEDS:
        sampling = Sampling(guidance_scale=guidance)
        request = edit(task, clip, mask, seed=seed, sampling=sampling)
        run = alone(engine, request)
        kept = run.tokens == codes
        assert kept[:, ~touched].all()
        changed |= not kept[:, touched].all()
        pixels = picture(engine, request, run.tokens)
        assert (pixels[:, ~mask] == request.frames[:, ~mask]).all()
        assert (pixels[:, deep] == engine.pixels(run.tokens)[:, deep]).all()
        raster = alone(engine, dataclasses.replace(request, schedule="raster"))
        assert (raster.tokens == run.tokens).all()
        assert run.steps < raster.steps == run.tokens.size
    assert changed, "some token inside the mask is another than the given one"


def test_a_mask_over_everything_generates_everything(engine, clip):
    request = edit(Task.TI2I, clip, np.ones((SIZE, SIZE), bool), seed=4)
    free = alone(engine, GenerationRequest(Task.T2I, PROMPT, seed=4))
    run = alone(engine, request)
    assert (run.tokens == free.tokens).all() and run.steps == free.steps
    assert (picture(engine, request, run.tokens) == engine.pixels(run.tokens)).all()


def test_given_tokens_and_neighbours_do_not_mix(engine, clip):
    requests = {0: predict(clip, 1, seed=8), 1: edit(Task.TI2I, clip, box(8, 8, 16, 16), seed=9)}
    expected = {slot: alone(engine, each).tokens for slot, each in requests.items()}
    runs = {slot: admit(engine, each, slot) for slot, each in requests.items()}
    step(engine, runs)
    finish(engine, runs)
    for slot, run in runs.items():
        assert (run.tokens == expected[slot]).all()


@pytest.mark.parametrize(
    ("mask", "rows", "columns"),
    [
        (box(0, 0, 1, 1), slice(0, 1), slice(0, 1)),  # one pixel takes its whole patch
        (box(3, 3, 5, 5), slice(0, 2), slice(0, 2)),  # four pixels around a corner take four
        (box(4, 8, 8, 12), slice(1, 2), slice(2, 3)),  # exactly one patch
        (box(0, 0, 16, 16), slice(0, 4), slice(0, 4)),
    ],
)
def test_a_token_is_known_if_its_whole_patch_is_outside(mask, rows, columns):
    frames = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    request = GenerationRequest(Task.TV2V, "x", frame_count=2, frames=frames, mask=mask)
    known = known_positions(request, Grid(2, CELLS, CELLS)).reshape(2, CELLS, CELLS)
    expected = np.ones((2, CELLS, CELLS), bool)
    expected[:, rows, columns] = False
    assert (known == expected).all()


def test_a_constant_step_at_the_border_is_spread_over_the_seam():
    """Given pixels are 50 brighter than decoded ones: 40, 30, 20, 10 of it are left inside."""
    given = np.random.default_rng(1).integers(50, 256, (1, SIZE, SIZE, 3), np.uint8)
    mask = box(2, 3, SIZE, SIZE - 1)
    mask[8, 3] = False  # an uneven border
    request = edit(Task.I2I, given, mask)
    restored = restore_given(request, 0, given[0] - np.uint8(50))
    assert (restored[~mask] == given[0][~mask]).all()
    missing = given[0].astype(int) - restored
    rows, columns = np.indices(mask.shape)
    outside = np.argwhere(~mask)
    depth = np.maximum(*(abs(np.stack([rows, columns])[..., None] - outside.T[:, None, None])))
    depth = depth.min(axis=-1)  # of every pixel in the mask, 1 at its border
    expected = 50 * np.minimum(depth, SEAM + 1) // (SEAM + 1)
    assert depth.max() > SEAM + 1 and (missing == expected[..., None]).all()


def test_the_seam_follows_what_surrounds_it():
    """Left of the mask given pixels are brighter, right of it darker; each side gets its own."""
    given = np.full((1, SIZE, SIZE, 3), 100, np.uint8)
    decoded = given[0].copy()
    decoded[:, :3], decoded[:, 13:] = 80, 110
    restored = restore_given(edit(Task.I2I, given, box(0, 3, SIZE, 13)), 0, decoded)
    assert (restored[:, 3:7] == np.array([116, 112, 108, 104])[:, None]).all()
    assert (restored[:, 7:9] == 100).all()
    assert (restored[:, 9:13] == np.array([98, 96, 94, 92])[:, None]).all()


@pytest.mark.parametrize("pixel", [0, 255])
def test_seams_stay_in_range(pixel):
    given = np.full((1, SIZE, SIZE, 3), pixel, np.uint8)
    decoded = np.full((SIZE, SIZE, 3), pixel, np.uint8)
    decoded[:4] = 255 - pixel
    restored = restore_given(edit(Task.I2I, given, box(4, 0, SIZE, SIZE)), 0, decoded)
    assert (restored == pixel).all(), "the correction points beyond the range"


def test_only_the_frames_own_pixels_are_blended(clip):
    """Whatever is decoded outside the mask further than a pixel from it changes nothing."""
    mask = box(4, 4, 12, 12)
    request = edit(Task.TV2V, clip, mask)
    decoded = 255 - clip[1]
    other = decoded.copy()
    other[:3], other[:, 13:] = 0, 0
    assert (restore_given(request, 1, decoded) == restore_given(request, 1, other)).all()
    whole = edit(Task.TV2V, clip, np.ones((SIZE, SIZE), bool))
    assert (restore_given(whole, 1, decoded) == decoded).all()


def test_nothing_given_is_nothing_restored():
    pixels = np.full((SIZE, SIZE, 3), 7, np.uint8)
    assert restore_given(GenerationRequest(Task.T2I, "x"), 0, pixels) is pixels
    assert not known_positions(GenerationRequest(Task.T2I, "x"), Grid(1, CELLS, CELLS)).any()
