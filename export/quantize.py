"""Linear layers for a folded decoder whose weights are stored as bytes, with one scale an output.

int8, for processors: activations are quantized too, with one scale a row, computed from it: so a
row's result depends on that row alone, whatever else is in the call. Products of whole numbers are
exact, so they have the same bits everywhere. Symmetric: byte b stands for b * scale, and 127 for
the largest.

fp8, for GPUs: of the weights alone, E4M3 (Micikevicius et al. 2022), 448 for the largest; products
are bf16's. A step reads half the bytes, where TensorRT dequantizes within the product.

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .fold import FoldedNUWA

_LARGEST = 127
_LARGEST_FP8 = 448.0
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


@torch.library.custom_op("nuwa::dequantize", mutates_args=())
def dequantize(weight_IO: Tensor, scale_O: Tensor) -> Tensor:
    """Weights [I, O] of fp8 times their output's scale, in the scales' type."""
    return weight_IO.to(scale_O.dtype) * scale_O


@dequantize.register_fake
def _(weight_IO, scale_O):
    return torch.empty_like(weight_IO, dtype=scale_O.dtype)


class Fp8Linear(nn.Module):
    """A linear layer of rows [T, I]. weight fp8 [I, O]; scale, bf16 [O], and bias [O] or None."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = (weight_OI.abs().amax(dim=1) / _LARGEST_FP8).clamp_min(1e-30).bfloat16()
        # The rounded scale may be smaller than it should; beyond the largest is NaN.
        scaled_OI = (weight_OI / scale_O.float()[:, None]).clamp(-_LARGEST_FP8, _LARGEST_FP8)
        weight_IO = scaled_OI.T.contiguous().to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight_IO, requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().bfloat16(), False)

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO = x_TI @ torch.ops.nuwa.dequantize(self.weight, self.scale)
        return y_TO if self.bias is None else y_TO + self.bias


def int8(folded: FoldedNUWA) -> FoldedNUWA:
    """Makes the decoder's linear layers int8, in place; encoders and tables stay as they are."""
    _replace(folded, {name: Int8Linear(linear) for name, linear in _linears(folded).items()})
    return folded


def fp8(folded: FoldedNUWA) -> FoldedNUWA:
    """Makes the decoder's linear layers fp8, and all else bf16, in place."""
    # From whole weights; and `to` would take the bytes for numbers to convert, too.
    layers = {name: Fp8Linear(linear) for name, linear in _linears(folded).items()}
    _replace(folded.to(torch.bfloat16), layers)
    return folded


QUANTIZED = {"int8": int8, "fp8": fp8}  # by precision of a bundle


def _linears(folded: FoldedNUWA) -> dict[str, nn.Linear]:
    within = {f"blocks.{i}.{name}" for i in range(len(folded.blocks)) for name in _LINEAR}
    return {name: cast(nn.Linear, folded.get_submodule(name)) for name in (*within, "head")}


def _replace(folded: FoldedNUWA, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        folded.set_submodule(name, layer)
