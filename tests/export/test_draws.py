"""The judge of drawn tokens: right draws pass, wrong ones do not, by distances known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nuwa.export.draws import draw_errors

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4]))  # cumulative: 0.1, 0.3, 0.6, 1.0


def error(token, uniform, temperature=1.0, top_k=0, top_p=1.0, logits=LOGITS) -> float:
    row = (temperature, top_k, top_p, uniform, token)
    return draw_errors(logits[None], *(np.array([value]) for value in row))[0]


@pytest.mark.parametrize(
    ("token", "uniform", "wanted"),
    [(0, 0.05, 0), (2, 0.45, 0), (3, 0.999, 0), (0, 0.15, 0.05), (3, 0.45, 0.15), (2, 0.1, 0.2)],
)
def test_distance_to_the_tokens_interval(token, uniform, wanted):
    assert error(token, uniform) == pytest.approx(wanted)


def test_temperature_sharpens():
    # Squared and normalised: 1/30, 4/30, 9/30, 16/30.
    assert error(2, 13 / 30, temperature=0.5) == 0
    assert error(1, 8 / 30, temperature=0.5) == pytest.approx(3 / 30)


def test_greedy_takes_the_likeliest():
    assert error(3, 0.0, temperature=0.0) == 0
    assert error(2, 0.0, temperature=0.0) > 0.1


def test_top_k_drops_the_others():
    assert error(0, 0.05, top_k=2) == 1.0
    assert error(2, 0.42, top_k=2) == 0  # 3/7 and 4/7
    assert error(3, 0.42, top_k=2) == pytest.approx(3 / 7 - 0.42)


def test_top_p_keeps_the_least_set_that_reaches_it():
    assert error(2, 0.0, top_p=0.65) == 0 and error(1, 0.0, top_p=0.65) == 1.0
    assert error(1, 0.0, top_p=0.75) == 0 and error(3, 0.9, top_p=0.35) == 0
    assert error(2, 0.0, top_p=0.35) == 1.0


def test_top_p_counts_within_top_k():
    # Of the two likeliest, 4/7 alone reaches 0.55.
    assert error(3, 0.0, top_k=2, top_p=0.55) == 0
    assert error(2, 0.0, top_k=2, top_p=0.55) == 1.0


@pytest.mark.parametrize("top_p", [0.7, 0.70002, 0.69998])
@pytest.mark.parametrize("token", [1, 2])
def test_edge_of_top_p_may_go_either_way(top_p, token):
    assert error(token, 0.0, top_p=top_p) == 0


def test_ties_are_kept():
    assert error(1, 0.4, top_k=1, logits=np.zeros(4)) == 0


def test_reference_sampler_draws_right():
    torch = pytest.importorskip("torch")
    from nuwa.training.sampling import sample

    rng = np.random.default_rng(0)
    rows, codes = 400, 300
    logits = torch.from_numpy(rng.normal(size=(rows, codes)).astype(np.float32)) * 3
    sampling = [
        torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 2.0], rows).astype(np.float32)),
        torch.from_numpy(rng.choice([0, 1, 7, 300], rows).astype(np.int32)),
        torch.from_numpy(rng.choice([1.0, 0.9, 0.2], rows).astype(np.float32)),
        torch.from_numpy(rng.random(rows).astype(np.float32)),
    ]
    tokens = sample(logits, *sampling, torch.arange(codes))
    arrays = [tensor.numpy() for tensor in (logits, *sampling, tokens)]
    assert draw_errors(*arrays).max() < 1e-6
    assert (draw_errors(*arrays[:-1], (arrays[-1] + 1) % codes) > 1e-6).mean() > 0.9
