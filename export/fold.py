"""Rewrites a NUWA model into the same function with less to compute: what is constant is folded.

LayerScale goes into the linear layer before it; the code table is projected once, <bos> becomes its
last row; the three position tables become one. The result has the interface that
`training.decode.DecoderStep` uses and shares no storage with the model it came from. Knows nothing
of ONNX.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import ModelConfig
from nuwa.training.nuwa import NUWA, DecoderBlock, Embedding

Module = TypeVar("Module", bound=nn.Module)


class FoldedEmbedding(nn.Module):
    """`Embedding` as two table look-ups; token and coordinate ids may be int32."""

    starts: Tensor

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.bos_id = embedding.bos_id
        projected_Kd = embedding.project(embedding.codes.weight)
        self.tokens = _parameter(torch.cat([projected_Kd, embedding.bos[None]]))
        axes = (embedding.frame, embedding.row, embedding.column)
        self.positions = _parameter(torch.cat(axes))
        starts = [0, len(embedding.frame), len(embedding.frame) + len(embedding.row)]
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int32))

    def forward(self, tokens_T: Tensor, coordinates_T3: Tensor) -> Tensor:
        """tokens int [T] (`bos_id` = <bos>), coordinates int [T, 3] -> [T, d]."""
        embedded_Td = F.embedding(tokens_T, self.tokens)
        axes_T3d = F.embedding(coordinates_T3 + self.starts, self.positions)
        has_position_T1 = (tokens_T != self.bos_id)[:, None]
        return embedded_Td + axes_T3d.sum(dim=1) * has_position_T1


class FoldedBlock(nn.Module):
    """`DecoderBlock` without LayerScale: its three scales are part of three linear layers."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__()
        self.self_norm, self.self_qkv = _copy(block.self_norm), _copy(block.self_qkv)
        self.self_out = _scaled(block.self_out, block.self_scale)
        self.cross_norm, self.cross_q = _copy(block.cross_norm), _copy(block.cross_q)
        self.cross_kv = _copy(block.cross_kv)
        self.cross_out = _scaled(block.cross_out, block.cross_scale)
        self.ff_norm, self.ff_in = _copy(block.ff_norm), _copy(block.ff_in)
        self.ff_out = _scaled(block.ff_out, block.ff_scale)
        self.bias = None if block.bias is None else _parameter(block.bias)

    def self_project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.self_qkv(self.self_norm(x)).chunk(3, dim=-1)

    def after_self(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.self_out(attended)

    def cross_query(self, x: Tensor) -> Tensor:
        return self.cross_q(self.cross_norm(x))

    def cross_memory(self, memory: Tensor) -> tuple[Tensor, ...]:
        return self.cross_kv(memory).chunk(2, dim=-1)

    def after_cross(self, x: Tensor, attended: Tensor) -> Tensor:
        after = x + self.cross_out(attended)
        hidden, gate = self.ff_in(self.ff_norm(after)).chunk(2, dim=-1)
        return after + self.ff_out(hidden * F.gelu(gate))


class FoldedNUWA(nn.Module):
    """The parts of NUWA that decoding uses, folded. In eval mode, parameters without gradients."""

    config: ModelConfig

    def __init__(self, nuwa: NUWA) -> None:
        super().__init__()
        self.config = nuwa.config
        self.text = _copy(nuwa.text)
        self.embedding = FoldedEmbedding(nuwa.embedding)
        self.blocks = nn.ModuleList(FoldedBlock(cast(DecoderBlock, block)) for block in nuwa.blocks)
        self.head_norm, self.head = _copy(nuwa.head_norm), _copy(nuwa.head)
        self.requires_grad_(False).eval()

    def logits(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., K]."""
        return self.head(self.head_norm(x))


@torch.no_grad()
def fold(nuwa: NUWA) -> FoldedNUWA:
    """The folded twin of a model; the model is left as it was."""
    return FoldedNUWA(nuwa)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _copy(module: Module) -> Module:
    return copy.deepcopy(module)


def _scaled(linear: nn.Linear, scale_d: Tensor) -> nn.Linear:
    """The layer x -> scale * linear(x)."""
    scaled = _copy(linear)
    with torch.no_grad():
        scaled.weight.mul_(scale_d[:, None])
        scaled.bias.mul_(scale_d)
    return scaled
