"""int8 linear layers for a folded decoder: weights stored as bytes, rows quantized as they come.

Weights have one scale an output, fixed; activations one a row, computed from it: so a row's result
depends on that row alone, whatever else is in the call. Products of whole numbers are exact, so
they have the same bits everywhere. Symmetric: byte b stands for b * scale, and 127 for the largest.

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fold import FoldedNUWA

_LARGEST = 127
_LINEAR = ("self_qkv", "self_out", "cross_q", "cross_out", "ff_in", "ff_out")  # of every block


@torch.library.custom_op("nuwa::matmul_integer", mutates_args=())
def matmul_integer(a_TI: Tensor, b_IO: Tensor) -> Tensor:
    """int8 matrices -> int32, exactly."""
    return (a_TI.double() @ b_IO.double()).to(torch.int32)


@matmul_integer.register_fake
def _(a_TI, b_IO):
    return a_TI.new_empty(a_TI.shape[0], b_IO.shape[1], dtype=torch.int32)


class Int8Linear(nn.Module):
    """A linear layer of rows [T, I]. weight int8 [I, O], scale f32 [O], bias f32 [O] or None."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = (weight_OI.abs().amax(dim=1) / _LARGEST).clamp_min(1e-30)
        whole_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(whole_OI.T.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().float(), False)

    def forward(self, x_TI: Tensor) -> Tensor:
        # As runtime/native/whole.h does it.
        scale_T1 = (x_TI.abs().amax(dim=-1, keepdim=True) * (1.0 / _LARGEST)).clamp_min(1e-30)
        scale_T1 = scale_T1 + (x_TI * 0.0).sum(dim=-1, keepdim=True)  # NaN if any of a row is
        whole_TI = (x_TI / scale_T1).round().to(torch.int8)
        sums_TO = torch.ops.nuwa.matmul_integer(whole_TI, self.weight)
        # One scale after the other: of both together ONNX Runtime makes a fused operator that takes
        # the first row's scale for all.
        y_TO = sums_TO.float() * scale_T1 * self.scale
        return y_TO if self.bias is None else y_TO + self.bias


def quantize(folded: FoldedNUWA) -> FoldedNUWA:
    """Makes the decoder's linear layers int8, in place; encoders and tables stay as they are."""
    for block in folded.blocks:
        for name in _LINEAR:
            setattr(block, name, Int8Linear(getattr(block, name)))
    folded.register_module("head", Int8Linear(folded.head))
    return folded
