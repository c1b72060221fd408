"""Both fast forms of 3DNA against the loop reference, over a table of odd shapes."""

import numpy as np
import pytest
import torch

from nuwa.spec.grid import FULL, Extent, Grid, neighbours
from nuwa.spec.reference import nearby_attention
from nuwa.training.nearby import BandedAttention

TABLE = [
    (Grid(1, 1, 1), Extent(3, 3, 3)),
    (Grid(1, 4, 4), Extent(3, 3, 3)),
    (Grid(3, 4, 5), Extent(3, 3, 3)),
    (Grid(4, 3, 3), Extent(5, 3, 1)),
    (Grid(2, 5, 3), Extent(1, 5, 3)),
    (Grid(3, 1, 6), Extent(3, 3, 5)),
    (Grid(5, 2, 1), Extent(3, 3, 3)),
    (Grid(2, 3, 3), FULL),
    (Grid(7, 1, 1), FULL),
    (Grid(2, 2, 2), Extent(9, 9, 9)),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("grid", "extent"), TABLE, ids=lambda v: str(v))
def test_banded_attention_equals_the_reference(grid, extent, heads, causal):
    draw = np.random.default_rng(0)
    extent = extent.resolve(grid)
    table = neighbours(grid, extent, causal=causal)
    query, key, value = draw.standard_normal((3, 2, grid.size, 4 * heads)).astype(np.float32)
    bias = draw.standard_normal((heads, table.shape[1])).astype(np.float32)
    for used in (bias, None):
        expected = [
            nearby_attention(
                query[b], key, value, np.full(grid.size, b, np.int32), table, used, heads=heads
            )
            for b in range(2)
        ]
        band = BandedAttention(grid, extent, causal=causal)
        inputs = [torch.from_numpy(x) for x in (query, key, value)]
        got = band(*inputs, None if used is None else torch.from_numpy(used), heads)
        np.testing.assert_allclose(got.numpy(), np.stack(expected), atol=2e-6)


def test_gradients_reach_every_visible_neighbour_and_no_other():
    grid, extent = Grid(3, 3, 3), Extent(3, 3, 3)
    table = neighbours(grid, extent, causal=True)
    band = BandedAttention(grid, extent, causal=True)
    query = torch.randn(1, grid.size, 4, dtype=torch.float32)
    for position in (0, 13, 26):
        key = torch.randn(1, grid.size, 4, requires_grad=True)
        value = torch.randn(1, grid.size, 4, requires_grad=True)
        band(query, key, value, None, 1)[0, position].sum().backward()
        reached = value.grad[0].abs().sum(1).nonzero().flatten().tolist()
        assert reached == sorted(table[position][table[position] >= 0].tolist())
