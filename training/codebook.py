"""Keeps a VQ-GAN codebook alive: start from data, moving averages, revival of dead codes.

Used by the VQ-GAN trainer; the model itself (vqgan.py) only ever sees the resulting weight.
Moving averages: van den Oord et al. 2017, appendix A; revival as in Dhariwal et al. 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .vqgan import Quantizer

ROUNDS = 8  # in which codes are revived, those of later ones away from those of earlier ones
MOST_REVIVED = 64  # codes in a step, so that they come from several batches


class CodebookAverage(nn.Module):
    """Sets each code to the moving average of the features assigned to it.

    decay: of the averages per step; revive_below: a code whose average worth falls under this is
    replaced by a random feature of the current batch. What a code is worth is how often it is used
    in a step, a use counted by its share of what is wrong about the output, 1 on average: what
    nobody sees, as how an empty background is encoded, would otherwise keep most codes busy.
    """

    count: Tensor
    worth: Tensor
    total: Tensor

    def __init__(self, quantizer: Quantizer, decay: float = 0.99, revive_below: float = 0.1):
        super().__init__()
        self.quantizer = [quantizer]  # in a list: not a submodule, so not saved twice
        self.decay, self.revive_below = decay, revive_below
        weight = quantizer.embedding.weight
        self.register_buffer("count", torch.ones(weight.shape[0]))
        self.register_buffer("worth", torch.ones(weight.shape[0]))
        self.register_buffer("total", weight.detach().clone())

    @torch.no_grad()
    def initialise(self, features_NE: Tensor, keep: int = 0) -> None:
        """Start from features [N, E], those far from the first `keep` codes, which stay, likelier.

        With none kept, far from the mean. Counts start low, so that codes nobody uses are revived
        within tens of steps; codes that there are not features enough for, in the next one.
        """
        weight, size = self.quantizer[0].embedding.weight, len(self.count)
        for average in (self.count, self.worth):
            average.fill_(2.0 * self.revive_below)
            average[keep:] = 0.0
        filled = keep + self._revive(features_NE, torch.ones(len(features_NE)), size)
        again = features_NE[torch.randint(len(features_NE), (size - filled,))].float()
        weight[filled:] = again + 0.01 * features_NE.float().std() * torch.randn_like(again)
        self.total.copy_(weight * self.count[:, None])

    @torch.no_grad()
    def update(self, features_NE: Tensor, codes_N: Tensor, cost_N: Tensor | None = None) -> int:
        """One step of the averages; returns how many codes were revived.

        cost_N: how wrong the output is where each feature is; codes are revived where it is most.
        """
        weight = self.quantizer[0].embedding.weight
        size = weight.shape[0]
        share_N = torch.ones(len(codes_N)) if cost_N is None else cost_N / cost_N.mean()
        share_N = share_N.nan_to_num(1.0).to(self.worth)  # where nothing is wrong
        self.worth.lerp_(
            torch.zeros_like(self.worth).index_add_(0, codes_N, share_N), 1.0 - self.decay
        )
        count = torch.bincount(codes_N, minlength=size).to(self.count)
        total = torch.zeros_like(self.total).index_add_(0, codes_N, features_NE.to(self.total))
        self.count.lerp_(count, 1.0 - self.decay)
        self.total.lerp_(total, 1.0 - self.decay)
        weight.copy_(self.total / self.count.clamp_min(1e-5)[:, None])
        return self._revive(features_NE, share_N, MOST_REVIVED)

    def _revive(self, features_NE: Tensor, cost_N: Tensor, most: int) -> int:
        """Gives dead codes other features, as many as there are at most; how many were given one.

        Drawn with probability proportional to the squared distance to their code, as in k-means++,
        and to their cost: by distance alone codes gather where features are many and differ in what
        nobody sees, as on an empty background.
        """
        weight = self.quantizer[0].embedding.weight
        dead = torch.lt(self.worth, self.revive_below)
        if not dead.any():
            return 0
        features_NE = features_NE.float()
        weight[dead] = features_NE.mean(0) if dead.all() else weight[~dead][0]  # nothing's nearest
        dead = dead.nonzero().flatten()[: min(most, len(features_NE))]
        nearest_NE = weight[self.quantizer[0].codes(features_NE)]
        distance_N = ((features_NE - nearest_NE) ** 2).sum(1)
        cost_N = cost_N.to(distance_N) + 1e-6
        for part in dead.chunk(ROUNDS):
            rows = torch.multinomial((distance_N + 1e-12) * cost_N, len(part))
            weight[part] = chosen = features_NE[rows]
            distance_N = torch.minimum(distance_N, torch.cdist(features_NE, chosen).amin(1) ** 2)
            self.count[part] = self.worth[part] = 2.0 * self.revive_below
            self.total[part] = chosen * 2.0 * self.revive_below
        return len(dead)
