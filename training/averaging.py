"""Averages of weights: over a run's steps (Polyak), which are those that are shipped; of runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """`model` holds the average of `source`; buffers and frozen parameters are plain copies.

    The average starts short, as (1 + step) / (10 + step), so that it forgets the first weights.
    """

    def __init__(self, source: Model, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"average decay {decay} is not in [0, 1)")
        self.source, self.decay = source, decay
        self.model = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimiser step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.source.parameters(), self.model.parameters(), strict=True)
        for current, average in pairs:
            if current.requires_grad:
                average.lerp_(current, 1.0 - decay)
            else:
                average.copy_(current)
        for buffer, kept in zip(self.source.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def copy(self) -> None:
        """Starts the average anew at the current weights."""
        self.model.load_state_dict(self.source.state_dict())


def weighted_mean(
    states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, Tensor]:
    """Of state dicts with the same names and shapes, summed in fp64; whole numbers are the first's.

    shares: above 0, of which each counts by its part of their sum.
    """
    total, mean = sum(shares), {}
    for name, first in states[0].items():
        mean[name] = first.clone()
        if first.is_floating_point():
            pairs = zip(states, shares, strict=True)
            parts = [state[name].double() * (share / total) for state, share in pairs]
            mean[name] = torch.stack(parts).sum(0).to(first.dtype)
    return mean
