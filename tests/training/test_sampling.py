"""Sampling against a slow description of it, and its promises."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nuwa.training.sampling import _ONE, _draw, _whole, guide, sample, sort_width


def slow(logits, temperature, top_k, top_p, uniform) -> int:
    """The token that one row of `sample` stands for, in float64."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(order)]
    if top_p < 1:
        share = np.cumsum(weights[kept]) / weights[kept].sum()
        kept = kept[: int(np.searchsorted(share, top_p)) + 1]
    masked = np.zeros_like(weights)
    masked[kept] = weights[kept]
    cdf = np.cumsum(masked)
    return int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))


def draw(logits, temperature, top_k, top_p, uniform):
    rows = len(logits)
    columns = [np.broadcast_to(v, rows) for v in (temperature, top_k, top_p, uniform)]
    width = sort_width(columns[1].tolist(), columns[2].tolist(), logits.shape[1])
    return sample(
        torch.from_numpy(logits),
        torch.from_numpy(columns[0].astype(np.float32)),
        torch.from_numpy(columns[1].astype(np.int32)),
        torch.from_numpy(columns[2].astype(np.float32)),
        torch.from_numpy(columns[3].astype(np.float32)),
        torch.arange(width, dtype=torch.int32),
    ).numpy()


CASES = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.5, 5, 1.0), (2.0, 0, 0.7), (1.3, 9, 0.4), (1.0, 1, 0.9)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_equals_the_slow_description(temperature, top_k, top_p):
    random = np.random.default_rng(1)
    logits = (3 * random.standard_normal((400, 33))).astype(np.float32)
    uniform = (random.integers(0, 2**24, 400) / 2**24).astype(np.float32)
    got = draw(logits, temperature, top_k, top_p, uniform)
    expected = [slow(row, temperature, top_k, top_p, u) for row, u in zip(logits, uniform)]  # noqa: B905
    assert got.tolist() == expected


def test_a_row_does_not_depend_on_its_company():
    random = np.random.default_rng(2)
    logits = (3 * random.standard_normal((6, 50))).astype(np.float32)
    uniform = random.random(6).astype(np.float32)
    temperature = np.array([1, 0, 0.5, 2, 1.3, 1])
    top_k, top_p = np.array([0, 0, 5, 0, 9, 1]), np.array([1, 1, 1, 0.7, 0.4, 0.9])
    together = draw(logits, temperature, top_k, top_p, uniform)
    for n in range(6):
        part = slice(n, n + 1)
        alone = draw(logits[part], temperature[part], top_k[part], top_p[part], uniform[part])
        assert alone[0] == together[n]


def test_the_ends_of_the_uniform_range_stay_inside_the_filter():
    logits = np.array([[5.0, 4.0, 3.0, -60.0]], np.float32)
    assert draw(logits, 1.0, 2, 1.0, 0.0)[0] == 0
    assert draw(logits, 1.0, 2, 1.0, 1 - 2**-24)[0] == 1
    assert draw(np.array([[-90.0, 5.0, -90.0]], np.float32), 1.0, 0, 1.0, 1 - 2**-24)[0] == 1


def test_frequencies_follow_the_distribution():
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    rows = 20000
    logits = np.tile(np.log(probability).astype(np.float32), (rows, 1))
    uniform = np.random.default_rng(3).random(rows).astype(np.float32)
    counts = np.bincount(draw(logits, 1.0, 0, 1.0, uniform), minlength=4) / rows
    np.testing.assert_allclose(counts, probability, atol=0.012)


@pytest.mark.parametrize("codes", [1, 33, 64, 97, 128, 200, 1673, 12288, 2**14])
def test_sums_in_blocks_draw_what_one_running_sum_draws(codes):
    """Whole numbers: exactly, also at the ends of blocks and of the uniform range."""
    random = np.random.default_rng(codes)
    weight = torch.from_numpy(random.integers(0, _ONE + 1, (40, codes)))
    weight[torch.from_numpy(random.random((40, codes)) < 0.6)] = 0
    weight[:4] = 0
    weight[torch.arange(40), torch.from_numpy(random.integers(0, codes, 40))] = _ONE
    uniform = torch.from_numpy((random.integers(0, 2**24, 40) / 2**24).astype(np.float32))
    uniform[::5] = 0.0
    uniform[1::5] = 1 - 2**-24
    cdf = weight.cumsum(dim=-1)
    edge = torch.from_numpy(random.integers(0, codes, 40))  # as near to it as uniform can be
    fraction = cdf.gather(1, edge[:, None])[:, 0] / cdf[:, -1]
    uniform[2::5] = ((fraction * _ONE).floor() / _ONE).clamp_max(1 - 2**-24).float()[2::5]
    expected = (cdf * _ONE <= _whole(uniform)[:, None] * cdf[:, -1:]).sum(dim=-1)
    assert torch.equal(_draw(weight, uniform), expected)
    assert expected.max() < codes


@pytest.mark.parametrize("codes", [1673, 8192, 12288, 12289])
def test_no_running_sum_is_over_all_codes(codes):
    """ONNX Runtime's CUDA provider needs as many additions as the square of its length."""
    rows = torch.zeros(2)
    ranks = torch.arange(1, dtype=torch.int32)
    arguments = (torch.zeros(2, codes), rows + 1, rows.int(), rows + 1, rows, ranks)
    graph = make_fx(sample, tracing_mode="fake")(*arguments).graph
    sums = [node for node in graph.nodes if "cumsum" in str(node.target)]
    lengths = [node.meta["val"].shape[-1] for node in sums]
    assert len(lengths) == 3 and max(lengths) <= 256, "of the sorted ones, in and of the blocks"


def test_guidance():
    logits = torch.randn(4, 9)
    guided = guide(logits, torch.tensor([2.0, 1.0, 1.0, 1.0]), torch.tensor([3, 1, 2, 3]))
    torch.testing.assert_close(guided[0], logits[3] + 2.0 * (logits[0] - logits[3]))
    assert torch.equal(guided[1:], logits[1:])


def test_sort_width():
    assert sort_width([0, 0], [1.0, 1.0], 100) == 1
    assert sort_width([0, 7], [1.0, 0.5], 100) == 7
    assert sort_width([3, 0], [1.0, 0.9], 100) == 100
    assert sort_width([500], [1.0], 100) == 100
