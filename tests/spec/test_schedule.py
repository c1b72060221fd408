"""Schedules against a brute-force check of every dependency, and the steps the design promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuwa.spec.grid import FULL, Extent, Grid, predecessors
from nuwa.spec.schedule import (
    Schedule,
    prefilled_schedule,
    raster_schedule,
    wave_index,
    wave_schedule,
)

sizes = st.integers(1, 5)
odd = st.sampled_from([1, 3, 5, None])
grids = st.builds(Grid, sizes, sizes, sizes)
extents = st.lists(st.builds(Extent, odd, odd, odd), min_size=1, max_size=2).map(tuple)
shifts = st.sampled_from(["nearest", "raster"])


def causal_set(grid: Grid, extent: Extent, position: int) -> set[int]:
    """The causal nearby set, cell by cell, straight from its definition (without the position)."""
    extent = extent.resolve(grid)
    here = divmod(position, grid.height * grid.width)
    f, (i, j) = here[0], divmod(here[1], grid.width)
    found = set()
    for q, (a, b, c) in enumerate(itertools.product(*map(range, grid.shape))):
        near = all(
            abs(x - y) <= r for x, y, r in zip((a, b, c), (f, i, j), extent.radius, strict=True)
        )
        if near and q < position:
            found.add(q)
    return found


def check(schedule: Schedule, extents, shift: str, known=frozenset(), lag: int = 0) -> None:
    """Replays the schedule: every read finds its entry written and not yet overwritten."""
    grid = schedule.grid
    before = predecessors(grid, shift)
    holder: dict[int, int] = {}
    call_of: dict[int, int] = {}
    for index, call in enumerate(schedule.calls):
        for p in call.tolist():
            q = int(before[p])
            assert q < 0 or q in known or call_of.get(q, index) < index, "fed an unknown token"
            assert p not in call_of
        for p in call.tolist():
            call_of[p] = index
            holder[int(schedule.entry[p])] = p
        for p in call.tolist():
            for q in set().union(*(causal_set(grid, e, p) for e in extents)) | {p}:
                assert holder[int(schedule.entry[q])] == q, "an entry was overwritten too early"
                assert q == p or call_of[q] <= index - lag
    assert sorted(call_of) == list(range(grid.size))


@settings(deadline=None, max_examples=120)
@given(grids, extents, shifts, st.sampled_from(["same_call", "earlier_call"]))
def test_wave_schedules_respect_every_dependency(grid, extents, shift, reads):
    schedule = wave_schedule(grid, extents, shift, reads)
    check(schedule, extents, shift, lag=int(reads == "earlier_call"))


@settings(deadline=None, max_examples=60)
@given(grids, extents)
def test_raster_schedules_respect_every_dependency(grid, extents):
    schedule = raster_schedule(grid, extents)
    check(schedule, extents, "raster")
    assert schedule.steps == grid.size


@settings(deadline=None, max_examples=80)
@given(grids, extents, shifts)
def test_no_schedule_is_shorter(grid, extents, shift):
    """The wave index is the longest chain of tokens: no exact schedule can have fewer steps."""
    before = predecessors(grid, shift)
    chain = {}
    for p in range(grid.size):
        near = set().union(*(causal_set(grid, e, p) for e in extents))
        fed = [chain[int(before[p])] + 1] if before[p] >= 0 else []
        chain[p] = max([0, *fed, *(chain[q] for q in near)])
    assert wave_index(grid, extents, shift).tolist() == [chain[p] for p in range(grid.size)]


@settings(deadline=None, max_examples=120)
@given(grids, extents, shifts, st.data())
def test_prefilled_schedules_respect_every_dependency(grid, extents, shift, data):
    known = np.array(data.draw(st.lists(st.booleans(), min_size=grid.size, max_size=grid.size)))
    base = wave_schedule(grid, extents, shift)
    schedule = prefilled_schedule(base, known, shift)
    check(schedule, extents, shift, known=set(np.flatnonzero(known).tolist()))
    assert schedule.steps <= base.steps


@pytest.mark.parametrize(
    ("grid", "extent", "steps", "widest", "strict_steps", "strict_widest"),
    [
        (Grid(1, 21, 21), Extent(3, 3, 3), 41, 21, 61, 11),
        (Grid(10, 21, 21), Extent(3, 3, 3), 59, 160, 97, 98),
        (Grid(10, 21, 21), Extent(5, 5, 5), 115, 77, 162, 49),
        (Grid(10, 8, 8), Extent(3, 3, 3), 33, 32, 58, 16),
    ],
)
def test_steps_of_the_design(grid, extent, steps, widest, strict_steps, strict_widest):
    """`earlier_call` is the design's table; `same_call` is what decoding uses."""
    fast = wave_schedule(grid, (extent,), "nearest")
    strict = wave_schedule(grid, (extent,), "nearest", "earlier_call")
    assert (fast.steps, fast.widest) == (steps, widest)
    assert (strict.steps, strict.widest) == (strict_steps, strict_widest)
    assert raster_schedule(grid, (extent,)).steps == grid.size


@pytest.mark.parametrize("radii", [(1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 1, 2), (2, 2, 2)])
def test_closed_forms_on_wide_grids(radii):
    frames, height, width = 4, 9, 11
    _, r_h, r_w = radii
    extent = Extent(*(2 * r + 1 for r in radii))
    grid = Grid(frames, height, width)
    fast = wave_schedule(grid, (extent,), "nearest").steps
    strict = wave_schedule(grid, (extent,), "nearest", "earlier_call").steps
    assert fast == (height - 1) * r_w + width + (frames - 1) * r_w * (r_h + 1)
    assert strict == (height - 1) * (r_w + 1) + width + (frames - 1) * (r_h + 1) * (r_w + 1)


@pytest.mark.parametrize(("extent", "shift"), [(FULL, "nearest"), (Extent(3, 3, 3), "raster")])
def test_what_cannot_be_parallel_falls_back_to_raster_length(extent, shift):
    grid = Grid(2, 4, 4)
    strict = wave_schedule(grid, (extent,), shift, "earlier_call")
    assert strict.steps == grid.size


def test_raster_shift_has_no_waves():
    assert wave_schedule(Grid(2, 4, 4), (Extent(3, 3, 3),), "raster").steps == 32


def test_cache_does_not_grow_with_the_clip():
    entries = [
        wave_schedule(Grid(frames, 8, 8), (Extent(3, 3, 3),), "nearest").entries
        for frames in (10, 40, 160)
    ]
    assert entries[0] == entries[1] == entries[2]


def test_bad_values_name_the_choices():
    with pytest.raises(ValueError, match="'same_call', 'earlier_call'"):
        wave_schedule(Grid(1, 2, 2), (Extent(3, 3, 3),), "nearest", "later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'nearest', 'raster'"):
        wave_schedule(Grid(1, 2, 2), (Extent(3, 3, 3),), "left")
    with pytest.raises(ValueError, match="odd window size"):
        Extent(2, 3, 3)
    with pytest.raises(ValueError, match="grid height is 0"):
        Grid(1, 0, 3)
