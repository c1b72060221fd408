"""Keeps a VQ-GAN codebook alive: start from data, moving averages, revival of dead codes.

Used by the VQ-GAN trainer; the model itself (vqgan.py) only ever sees the resulting weight.
Moving averages: van den Oord et al. 2017, appendix A; revival as in Dhariwal et al. 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .vqgan import Quantizer


class CodebookAverage(nn.Module):
    """Sets each code to the moving average of the features assigned to it.

    decay: of the averages per step; revive_below: a code whose average count falls under this is
    replaced by a random feature of the current batch.
    """

    count: Tensor
    total: Tensor

    def __init__(self, quantizer: Quantizer, decay: float = 0.99, revive_below: float = 0.1):
        super().__init__()
        self.quantizer = [quantizer]  # in a list: not a submodule, so not saved twice
        self.decay, self.revive_below = decay, revive_below
        weight = quantizer.embedding.weight
        self.register_buffer("count", torch.ones(weight.shape[0]))
        self.register_buffer("total", weight.detach().clone())

    @torch.no_grad()
    def initialise(self, features_NE: Tensor, keep: int = 0) -> None:
        """Start from features [N, E], those far from the first `keep` codes, which stay, likelier.

        With none kept, far from the mean. Counts start low, so that codes nobody uses are revived
        within tens of steps.
        """
        weight = self.quantizer[0].embedding.weight
        filler = weight[0] if keep else features_NE.float().mean(0)
        weight[keep:] = filler
        weight[keep:] = self._choose(features_NE, weight.shape[0] - keep)
        self.count.fill_(2.0 * self.revive_below)
        self.total.copy_(weight * self.count[:, None])

    @torch.no_grad()
    def update(self, features_NE: Tensor, codes_N: Tensor) -> int:
        """One step of the averages; returns how many codes were revived."""
        weight = self.quantizer[0].embedding.weight
        size = weight.shape[0]
        count = torch.bincount(codes_N, minlength=size).to(self.count)
        total = torch.zeros_like(self.total).index_add_(0, codes_N, features_NE.to(self.total))
        self.count.lerp_(count, 1.0 - self.decay)
        self.total.lerp_(total, 1.0 - self.decay)
        weight.copy_(self.total / self.count.clamp_min(1e-5)[:, None])
        dead = torch.lt(self.count, self.revive_below)
        revived = int(dead.sum())
        if revived:
            chosen = self._choose(features_NE, revived)
            weight[dead] = chosen
            self.count[dead] = 2.0 * self.revive_below
            self.total[dead] = chosen * self.count[dead][:, None]
        return revived

    def _choose(self, features_NE: Tensor, number: int) -> Tensor:
        """Features drawn with probability proportional to the squared distance to their code.

        As in k-means++: without it most draws repeat what is most common, an empty background.
        """
        features_NE = features_NE.float()
        weight = self.quantizer[0].embedding.weight
        nearest = weight[self.quantizer[0].codes(features_NE)]
        distance_N = ((features_NE - nearest) ** 2).sum(1) + 1e-12
        rows = torch.multinomial(distance_N, number, replacement=number > len(distance_N))
        noise = 0.01 * features_NE.std() * torch.randn_like(features_NE[rows])
        return features_NE[rows] + noise
