"""Our Muon against torch's: the same updates but for the rounding of bf16, and the same state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nuwa.training import muon


def _steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], count: int) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw)
        optimizer.step()


def _weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((24, 64), (64, 24), (32, 32))]


@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "bf16"])
def test_updates_are_those_of_torch(monkeypatch, fast):
    monkeypatch.setattr(muon, "fast_bf16", lambda device_type: fast)
    ours, theirs = _weights(), _weights()
    before = copy.deepcopy(ours)
    _steps(muon.Muon(ours, 0.02, weight_decay=0.01), ours, 3)
    reference = torch.optim.Muon(theirs, 0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    _steps(reference, theirs, 3)
    for mine, other, start in zip(ours, theirs, before, strict=True):
        if fast:
            assert torch.equal(mine, other)
        moved = (other - start).norm()
        assert moved > 0.01 and (mine - other).norm() < 0.02 * moved


def test_it_goes_on_from_a_state_of_torch():
    weights = _weights()
    reference = torch.optim.Muon(weights, 0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    _steps(reference, weights, 2)
    copied = copy.deepcopy(weights)
    ours = muon.Muon(copied, 0.02, weight_decay=0.01)
    ours.load_state_dict(reference.state_dict())
    _steps(ours, copied, 1)
    _steps(reference, weights, 1)
    for mine, other in zip(copied, weights, strict=True):
        torch.testing.assert_close(mine, other, atol=3e-3, rtol=0)


def test_singular_values_come_near_one():
    matrix = torch.randn((16, 48), generator=torch.Generator().manual_seed(2))
    found = muon.orthogonalized(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
