"""Nearby sets and predecessors against their definitions."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nuwa.spec.grid import (
    FULL,
    Extent,
    Grid,
    cross_neighbours,
    neighbours,
    predecessors,
    window_offsets,
)

sizes = st.integers(1, 5)
grids = st.builds(Grid, sizes, sizes, sizes)
odd = st.sampled_from([1, 3, 5, None])
extents = st.builds(Extent, odd, odd, odd)


@settings(deadline=None, max_examples=60)
@given(grids, grids, extents)
def test_cross_neighbours_are_the_cells_around_the_scaled_centre(query, key, extent):
    table = cross_neighbours(query, key, extent)
    radius = extent.resolve(key).radius
    for p, cell in enumerate(itertools.product(*map(range, query.shape))):
        centre = [c * k // q for c, k, q in zip(cell, key.shape, query.shape, strict=True)]
        expected = {
            n
            for n, other in enumerate(itertools.product(*map(range, key.shape)))
            if all(abs(a - b) <= r for a, b, r in zip(other, centre, radius, strict=True))
        }
        row = table[p][table[p] >= 0]
        assert set(row.tolist()) == expected
        assert len(row) == len(expected)


@settings(deadline=None, max_examples=60)
@given(grids, extents)
def test_causal_neighbours_are_the_earlier_half_ending_in_the_position(grid, extent):
    whole, causal = neighbours(grid, extent, causal=False), neighbours(grid, extent, causal=True)
    for p in range(grid.size):
        assert set(causal[p][causal[p] >= 0]) == {q for q in whole[p].tolist() if 0 <= q <= p}
    assert (causal[:, -1] == np.arange(grid.size)).all()


def test_offsets_have_a_fixed_order():
    offsets = window_offsets(Extent(3, 3, 3), causal=False).tolist()
    assert offsets == sorted(offsets)
    assert len(window_offsets(Extent(3, 3, 3), causal=True)) == 14
    assert len(window_offsets(Extent(1, 3, 3), causal=True)) == 5


def test_text_sees_all_text():
    table = neighbours(Grid(7, 1, 1), FULL, causal=False)
    assert all(set(row[row >= 0]) == set(range(7)) for row in table)


def test_predecessor_of_each_kind():
    before = predecessors(Grid(2, 3, 4))
    assert before[0] == -1  # <bos>
    assert before[1] == 0  # left
    assert before[4] == 0  # above, at a row start
    assert before[12] == 0  # previous frame, at a frame start
    assert before[16] == 12  # above, inside the second frame
    assert predecessors(Grid(2, 3, 4), "raster").tolist() == list(range(-1, 23))
