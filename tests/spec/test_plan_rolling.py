"""Plans of clips of any length, against the tables of whole volumes and a replay of every call."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nuwa.spec.config import DecoderConfig, preset
from nuwa.spec.grid import FULL, MASKED, Extent, Grid, neighbours, predecessors
from nuwa.spec.plan import (
    MAX_PREDICTED_FRAMES,
    STAGED_CALLS,
    Plan,
    RollingPlan,
    base_schedule,
    cache_entries,
    decode_plan,
    endless_schedule,
    longest_clip,
)
from nuwa.spec.schedule import Schedule, prefilled_schedule, raster_schedule, wave_schedule

sizes = st.integers(1, 5)
odd = st.sampled_from([1, 3, 5, 7, None])
extents = st.lists(st.builds(Extent, odd, odd, odd), min_size=1, max_size=2).map(tuple)
decoders = st.builds(
    lambda grid, extents, shift: DecoderConfig(
        grid=grid, extents=extents, shift=shift, layers=len(extents), width=4, heads=1
    ),
    st.builds(Grid, st.integers(2, 4), sizes, sizes),
    extents,
    st.sampled_from(["nearest", "raster"]),
)
kinds = st.sampled_from(["wave", "raster"])


def clip(decoder: DecoderConfig, frames: int) -> Grid:
    return Grid(frames, decoder.grid.height, decoder.grid.width)


def whole(decoder: DecoderConfig, frames: int, kind: str) -> Schedule:
    """The schedule of a clip as one volume, however long."""
    if kind == "raster":
        return raster_schedule(clip(decoder, frames), decoder.window_extents)
    return wave_schedule(clip(decoder, frames), decoder.window_extents, decoder.shift)


def replay(plan: Plan, decoder: DecoderConfig, known: int) -> list[np.ndarray]:
    """Checks every row of every call against the volume's tables; the positions of each call."""
    grid, entries = plan.grid, cache_entries(decoder)
    windows = [neighbours(grid, extent, causal=True) for extent in decoder.window_extents]
    nearby, before = np.concatenate(windows, axis=1), predecessors(grid, decoder.shift)
    where = grid.coordinates() % [decoder.grid.frames, grid.height, grid.width]
    cells = grid.height * grid.width
    holder = np.full(entries, -2)
    call_of = np.full(grid.size + 1, plan.steps)
    call_of[: known * cells], call_of[grid.size] = -1, -1  # tokens that are there from the start
    calls = []
    for step in range(plan.steps):
        call = plan.call(step)
        assert all(part.dtype == np.int32 for part in call)
        assert (call.coordinates == where[call.position]).all()
        fed = np.where(before[call.position] == MASKED, grid.size, before[call.position])
        assert (call.fed == fed).all()
        assert (call_of[fed] < step).all(), "fed a token that is not there yet"
        call_of[call.position[call.position >= known * cells]] = step
        assert len(set(call.write_index.tolist())) == len(call.write_index)
        holder[call.write_index] = call.position
        wanted = nearby[call.position]
        assert ((call.neighbours == MASKED) == (wanted == MASKED)).all()
        held = np.where(wanted == MASKED, MASKED, holder[call.neighbours])
        assert (held == wanted).all(), "an entry holds another position"
        calls.append(call.position)
    assert np.array_equal(np.sort(np.concatenate(calls)), np.arange(grid.size))
    check_frames(plan, calls)
    return calls


def check_frames(plan: Plan, calls: list[np.ndarray]) -> None:
    """Frames are said to be complete when they are, and fit in as many as the plan says."""
    cells = plan.grid.height * plan.grid.width
    left = np.full(plan.grid.frames + 1, cells)
    left[-1] = 1  # there is no such frame, so it is never complete
    for step, position in enumerate(calls):
        call = plan.call(step)
        fed = call.fed[call.fed < plan.grid.size] // cells
        oldest = min(int(np.argmax(left > 0)), int(fed.min(initial=plan.grid.frames)))
        assert position.max() // cells - oldest < plan.held_frames
        np.subtract.at(left, position // cells, 1)
        assert plan.complete_frames(step) == np.argmax(left > 0)


@settings(deadline=None, max_examples=150)
@given(decoders, kinds, st.data())
def test_a_rolling_plan_is_the_schedule_of_the_whole_clip(decoder, kind, data):
    frames = data.draw(st.integers(1, 3 * decoder.grid.frames))
    plan = RollingPlan(decoder, frames, kind=kind)
    calls = replay(plan, decoder, known=0)
    expected = whole(decoder, frames, kind)
    assert plan.steps == len(calls) == expected.steps
    assert all(np.array_equal(a, b) for a, b in zip(calls, expected.calls, strict=True))
    assert expected.entries <= endless_schedule(decoder, kind).entries


@settings(deadline=None, max_examples=150)
@given(decoders, kinds, st.data())
def test_given_frames_are_prefilled_in_few_calls(decoder, kind, data):
    frames = data.draw(st.integers(2, 3 * decoder.grid.frames))
    known = data.draw(st.integers(1, min(decoder.grid.frames, frames - 1)))
    plan = RollingPlan(decoder, frames, known, kind)
    calls = replay(plan, decoder, known)
    base = whole(decoder, frames, kind)
    assert np.array_equal(np.concatenate(calls), np.concatenate(base.calls))
    if kind == "raster":
        assert plan.steps == base.steps
        return
    given_tokens = np.arange(plan.grid.size) < known * plan.grid.height * plan.grid.width
    ring = dataclasses.replace(base, entries=endless_schedule(decoder).entries)
    expected = prefilled_schedule(ring, given_tokens, decoder.shift)
    assert all(np.array_equal(a, b) for a, b in zip(calls, expected.calls, strict=True))


ALL_AT_ONCE = DecoderConfig(  # no frame waits for another, so that a frame begins in every wave
    grid=Grid(2, 4, 5), extents=(Extent(1, 5, None),), shift="nearest", layers=1, width=4, heads=1
)


@settings(deadline=None, max_examples=60)
@given(decoders, kinds)
@example(ALL_AT_ONCE, "wave")
def test_the_ring_is_no_larger_than_a_long_clip_needs(decoder, kind):
    grid = decoder.grid
    frames = 8 * grid.frames + 2 * grid.height * grid.width  # those under way at once, and more
    assert whole(decoder, frames, kind).entries == endless_schedule(decoder, kind).entries


@settings(deadline=None, max_examples=60)
@given(decoders, kinds, st.integers(0, 20), st.data())
def test_rows_are_the_same_however_they_are_staged(decoder, kind, offset, data):
    frames = data.draw(st.integers(2, 8 * decoder.grid.frames))
    known = data.draw(st.integers(0, min(decoder.grid.frames, frames - 1)))
    plan = RollingPlan(decoder, frames, known, kind, offset)
    step, ends = 0, []
    while step < plan.steps:
        rows, bounds = plan.stage(step)
        for first, last in itertools.pairwise(bounds):
            for one, part in zip(plan.call(step), rows, strict=True):
                assert np.array_equal(one, part[first:last])
            step += 1
        ends.append(step)
    assert ends[-1] == plan.steps
    assert all(end % STAGED_CALLS == offset % STAGED_CALLS for end in ends[:-1])
    assert (np.diff([0, *ends]) <= STAGED_CALLS).all()


@pytest.mark.parametrize("name", ["sprites", "base"])
def test_the_presets_roll(name):
    decoder = preset(name).decoder
    frames = decoder.grid.frames + 2
    plan = RollingPlan(decoder, frames, known_frames=3)
    replay(plan, decoder, known=3)
    assert cache_entries(decoder) == {"sprites": 222, "base": 1101}[name]


@pytest.mark.parametrize("extent", [Extent(3, 3, 3), FULL])
@pytest.mark.parametrize("kind", ["wave", "raster"])
def test_the_longest_clip(extent, kind):
    grid = Grid(3, 2, 2)
    decoder = DecoderConfig(grid=grid, extents=(extent,), width=4, heads=1)
    plan = RollingPlan(decoder, MAX_PREDICTED_FRAMES, known_frames=2, kind=kind)
    calls = replay(plan, decoder, known=2)
    assert len(calls) == plan.steps and plan.grid.size == 4 * MAX_PREDICTED_FRAMES


def test_up_to_the_trained_length_it_is_the_ordinary_plan():
    decoder = preset("sprites").decoder
    for frames in (1, 4, 10):
        tables, rolling = decode_plan(decoder, clip(decoder, frames)), RollingPlan(decoder, frames)
        assert tables.steps == rolling.steps
        for step in range(tables.steps):
            one, other = tables.call(step), rolling.call(step)
            for name in ("position", "coordinates", "fed"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
            assert tables.complete_frames(step) == rolling.complete_frames(step)


@settings(deadline=None, max_examples=60)
@given(decoders, kinds, st.data())
def test_tables_call_by_call(decoder, kind, data):
    frames = data.draw(st.integers(1, decoder.grid.frames))
    plan = decode_plan(decoder, clip(decoder, frames), kind)
    calls = replay(plan, decoder, known=0)
    rows = [plan.position[plan.rows(step)] for step in range(plan.steps)]
    assert all(np.array_equal(a, b) for a, b in zip(calls, rows, strict=True))
    assert plan.held_frames == frames


def test_caches_of_image_models_are_no_larger_than_an_image_needs():
    grid = Grid(1, 8, 8)
    decoder = DecoderConfig(grid=grid, extents=(Extent(3, 3, 3),), width=4, heads=1)
    kinds = ("wave", "raster")
    assert cache_entries(decoder) == max(base_schedule(decoder, grid, k).entries for k in kinds)
    assert longest_clip(decoder) == 1
    with pytest.raises(ValueError, match="decodes single images"):
        RollingPlan(decoder, 2)


def test_bad_values_name_the_choices():
    decoder = preset("sprites").decoder
    assert longest_clip(decoder) == MAX_PREDICTED_FRAMES == 1000
    for frames in (0, 1001):
        with pytest.raises(ValueError, match=rf"{frames} frames are not in \[1, 1000\]"):
            RollingPlan(decoder, frames)
    for frames, known, most in ((30, 11, 10), (5, 5, 4), (30, -1, 10)):
        with pytest.raises(ValueError, match=rf"{known} known frames are not in \[0, {most}\]"):
            RollingPlan(decoder, frames, known)
    with pytest.raises(ValueError, match="'wave', 'raster'"):
        RollingPlan(decoder, 30, kind="spiral")
