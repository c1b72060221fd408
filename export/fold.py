"""Rewrites a NUWA model into the same function with less to compute: what is constant is folded.

LayerScale goes into the linear layer before it; code tables are projected once, <bos> or the hidden
token becomes their last row; the three position tables become one; the bias of text is part of
cross attention's table. The result has the interface that the modules of training/decode.py use and
shares no storage with the model it came from. Knows nothing of ONNX.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import ModelConfig
from nuwa.training.nuwa import NUWA, DecoderBlock, Embedding
from nuwa.training.visual import VisualBlock, VisualEmbedding, VisualEncoder

Module = TypeVar("Module", bound=nn.Module)


class FoldedPositions(nn.Module):
    """The three position tables of an embedding as one look-up."""

    starts: Tensor

    def __init__(self, embedding: Embedding | VisualEmbedding) -> None:
        super().__init__()
        axes = (embedding.frame, embedding.row, embedding.column)
        self.table = _parameter(torch.cat(axes))
        starts = [0, len(embedding.frame), len(embedding.frame) + len(embedding.row)]
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int32))

    def forward(self, coordinates_T3: Tensor) -> Tensor:
        """coordinates int [T, 3] -> [T, d]."""
        return F.embedding(coordinates_T3 + self.starts, self.table).sum(dim=1)


class FoldedEmbedding(nn.Module):
    """`Embedding` as two table look-ups; token and coordinate ids may be int32."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.bos_id = embedding.bos_id
        projected_Kd = embedding.project(embedding.codes.weight)
        self.tokens = _parameter(torch.cat([projected_Kd, embedding.bos[None]]))
        self.positions = FoldedPositions(embedding)

    def forward(self, tokens_T: Tensor, coordinates_T3: Tensor) -> Tensor:
        """tokens int [T] (`bos_id` = <bos>), coordinates int [T, 3] -> [T, d]."""
        has_position_T1 = (tokens_T != self.bos_id)[:, None]
        position_Td = self.positions(coordinates_T3) * has_position_T1
        return F.embedding(tokens_T, self.tokens) + position_Td


class FoldedVisualEmbedding(nn.Module):
    """`VisualEmbedding` as two table look-ups; ids of both codebooks and of the hidden token."""

    def __init__(self, embedding: VisualEmbedding) -> None:
        super().__init__()
        self.ids = _parameter(embedding.table())
        self.positions = FoldedPositions(embedding)

    def forward(self, ids_N: Tensor, coordinates_N3: Tensor) -> Tensor:
        """ids int [N], coordinates int [N, 3] -> [N, d]."""
        return F.embedding(ids_N, self.ids) + self.positions(coordinates_N3)


class FoldedVisualBlock(nn.Module):
    """`VisualBlock` without LayerScale."""

    def __init__(self, block: VisualBlock) -> None:
        super().__init__()
        self.self_norm, self.self_qkv = _copy(block.self_norm), _copy(block.self_qkv)
        self.self_out = _scaled(block.self_out, block.self_scale)
        self.ff_norm, self.ff_in = _copy(block.ff_norm), _copy(block.ff_in)
        self.ff_out = _scaled(block.ff_out, block.ff_scale)
        self.bias = _optional(block.bias)

    def self_project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.self_qkv(self.self_norm(x)).chunk(3, dim=-1)

    def after_self(self, x: Tensor, attended: Tensor) -> Tensor:
        after = x + self.self_out(attended)
        hidden, gate = self.ff_in(self.ff_norm(after)).chunk(2, dim=-1)
        return after + self.ff_out(hidden * F.gelu(gate))


class FoldedVisualEncoder(nn.Module):
    """The parts of VisualEncoder that `training.decode.VisualConditions` uses."""

    def __init__(self, visual: VisualEncoder) -> None:
        super().__init__()
        self.heads, self.columns = visual.heads, visual.columns
        self.embedding = FoldedVisualEmbedding(visual.embedding)
        self.blocks = nn.ModuleList(FoldedVisualBlock(block) for block in visual.blocks)
        self.norm, self.project = _copy(visual.norm), _copy(visual.project)

    def memory(self, x: Tensor) -> Tensor:
        return self.project(self.norm(x))


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
        self.bias = _optional(block.bias)
        self.cross_bias = _optional(block.cross_bias_table())

    def self_project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.self_qkv(self.self_norm(x)).chunk(3, dim=-1)

    def after_self(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.self_out(attended)

    def cross_bias_table(self) -> Tensor | None:
        return self.cross_bias

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
        self.visual = None if nuwa.visual is None else FoldedVisualEncoder(nuwa.visual)
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


def _optional(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else _parameter(value)


def _copy(module: Module) -> Module:
    return copy.deepcopy(module)


def _scaled(linear: nn.Linear, scale_d: Tensor) -> nn.Linear:
    """The layer x -> scale * linear(x)."""
    scaled = _copy(linear)
    with torch.no_grad():
        scaled.weight.mul_(scale_d[:, None])
        scaled.bias.mul_(scale_d)
    return scaled
