"""Exponential moving average of a model's weights (Polyak), the weights that are shipped."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

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
