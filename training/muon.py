"""Muon for processors that do not multiply in bf16, which torch's own always orthogonalizes in.

There, bf16 products are emulated: most of a training step went into them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .precision import fast_bf16

RMS = 0.2  # of an update, as AdamW's are (Liu et al., arXiv 2502.16982)


class Muon(torch.optim.Muon):
    """torch's Muon with "match_rms_adamw" rates; its state reads as torch's does.

    parameters: matrices. Orthogonalizes in bf16 where that is fast, else in fp32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes no closure here")
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, parameters, gradients, averages)
            for parameter, gradient, average in zip(parameters, gradients, averages, strict=True):
                average.lerp_(gradient, 1 - momentum)
                update = gradient.lerp(average, momentum) if group["nesterov"] else average
                dtype = torch.bfloat16 if fast_bf16(update.device.type) else torch.float32
                update = orthogonalized(
                    update.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                parameter.mul_(1 - lr * group["weight_decay"])
                rate = lr * RMS * math.sqrt(max(parameter.shape))
                parameter.add_(update.to(parameter.dtype), alpha=-rate)


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The nearest matrix with singular values about 1, by Newton-Schulz iterations in its dtype."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    each = matrix.T if tall else matrix
    each = each / each.norm().clamp(min=eps)
    for _ in range(steps):
        gram = each @ each.T
        each = torch.addmm(each, torch.addmm(gram, gram, gram, beta=b, alpha=c), each, beta=a)
    return each.T if tall else each
