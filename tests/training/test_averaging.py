"""The weight average: short at first, then of the asked length; frozen weights are copied."""

import pytest
import torch

from nuwa.training.averaging import WeightAverage


def test_average_forgets_the_start_and_copies_what_is_frozen():
    source = torch.nn.BatchNorm1d(2)
    source.bias.requires_grad_(False)
    average = WeightAverage(source, 0.99)
    with torch.no_grad():
        source.weight.fill_(5.0)
        source.bias.fill_(7.0)
        source.running_mean.fill_(3.0)
    for step in range(30):
        average.update(step)
    assert average.model.weight.tolist() == pytest.approx([5.0, 5.0], abs=0.01)
    assert average.model.bias.tolist() == [7.0, 7.0]
    assert average.model.running_mean.tolist() == [3.0, 3.0]


def test_late_steps_weigh_one_minus_decay():
    source = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(source, 0.9)
    before = average.model.weight.item()
    torch.nn.init.constant_(source.weight, before + 1.0)
    average.update(10**6)
    assert average.model.weight.item() == pytest.approx(before + 0.1, abs=1e-6)
    with pytest.raises(ValueError, match="decay 1.0"):
        WeightAverage(source, 1.0)
