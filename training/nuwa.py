"""NÜWA: a text encoder and a 3DNA decoder over the tokens of an image or a clip (arXiv 2111.12417).

`forward` is teacher-forced training over whole volumes; decode.py runs the same weights position by
position with a cache. Knows nothing of pixels, losses or sampling.

Legend: B batch, M text length, N positions of a volume, d decoder width, K codebook size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import DecoderConfig, ModelConfig, TextConfig
from nuwa.spec.grid import Grid, predecessors

from .nearby import BandedAttention

_NORM_EPS = 1e-5


class TextBlock(nn.Module):
    """Pre-LN transformer block with full attention, as in CLIP's text encoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ff_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.ff_in = nn.Linear(width, 4 * width)
        self.ff_out = nn.Linear(4 * width, width)

    def forward(self, x_BMd: Tensor, mask_B11M: Tensor | None) -> Tensor:
        batch, length, width = x_BMd.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_BMd)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11M)
        x_BMd = x_BMd + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x_BMd + self.ff_out(F.gelu(self.ff_in(self.ff_norm(x_BMd))))


class TextEncoder(nn.Module):
    """Token ids [B, M] -> [B, M, d]. `pad` marks ids that nothing may attend to."""

    def __init__(self, config: TextConfig, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position = nn.Parameter(torch.empty(config.length, config.width))
        self.blocks: Any = nn.ModuleList(
            TextBlock(config.width, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.project = nn.Linear(config.width, out_width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    @property
    def pad(self) -> int:
        """The padding id: the last of the vocabulary (spec/text.py)."""
        return self.config.vocabulary_size - 1

    def mask(self, ids_BM: Tensor) -> Tensor | None:
        """bool [B, 1, 1, M], True = may be attended to; None where padding is not masked."""
        return (ids_BM != self.pad)[:, None, None, :] if self.config.mask_padding else None

    def forward(self, ids_BM: Tensor) -> Tensor:
        mask = self.mask(ids_BM)
        x_BMd = self.embedding(ids_BM) + self.position[: ids_BM.shape[1]]
        for block in self.blocks:
            x_BMd = block(x_BMd, mask)
        return self.project(self.norm(x_BMd))


class DecoderBlock(nn.Module):
    """Self 3DNA, cross attention, GEGLU feed-forward; pre-LN, LayerScale, no bias on q, k, v.

    Cut into the parts that training and decoding compose differently: everything but the attention
    itself.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        d, inner = config.width, config.ff_multiplier * config.width
        self.self_norm = nn.LayerNorm(d, eps=_NORM_EPS)
        self.self_qkv = nn.Linear(d, 3 * d, bias=False)
        self.self_out = nn.Linear(d, d)
        self.cross_norm = nn.LayerNorm(d, eps=_NORM_EPS)
        self.cross_q = nn.Linear(d, d, bias=False)
        self.cross_kv = nn.Linear(d, 2 * d, bias=False)
        self.cross_out = nn.Linear(d, d)
        self.ff_norm = nn.LayerNorm(d, eps=_NORM_EPS)
        self.ff_in = nn.Linear(d, 2 * inner)
        self.ff_out = nn.Linear(inner, d)
        scale = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6  # CaiT's rule
        self.self_scale = nn.Parameter(torch.full((d,), scale))
        self.cross_scale = nn.Parameter(torch.full((d,), scale))
        self.ff_scale = nn.Parameter(torch.full((d,), scale))
        start, stop = config.neighbour_columns(layer)
        self.bias = (
            nn.Parameter(torch.zeros(config.heads, stop - start)) if config.relative_bias else None
        )

    def self_project(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., d] -> query, key, value [..., d]."""
        return self.self_qkv(self.self_norm(x)).chunk(3, dim=-1)

    def after_self(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.self_scale * self.self_out(attended)

    def cross_query(self, x: Tensor) -> Tensor:
        return self.cross_q(self.cross_norm(x))

    def cross_memory(self, memory: Tensor) -> tuple[Tensor, ...]:
        """[..., d] -> key, value [..., d]."""
        return self.cross_kv(memory).chunk(2, dim=-1)

    def after_cross(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.cross_scale * self.cross_out(attended)
        hidden, gate = self.ff_in(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff_scale * self.ff_out(hidden * F.gelu(gate))


class Embedding(nn.Module):
    """Input of a position: the fed token's code vector, projected, plus three axis positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        grid, d = config.decoder.grid, config.decoder.width
        self.bos_id = config.bos
        self.codes = nn.Embedding(config.image.codebook_size, config.image.embedding_dim)
        self.project = nn.Linear(config.image.embedding_dim, d)
        self.bos = nn.Parameter(torch.randn(d) * 0.02)
        self.frame = nn.Parameter(torch.randn(grid.frames, d) * 0.02)
        self.row = nn.Parameter(torch.randn(grid.height, d) * 0.02)
        self.column = nn.Parameter(torch.randn(grid.width, d) * 0.02)

    def forward(self, tokens: Tensor, coordinates: Tensor) -> Tensor:
        """tokens int [..., T] (`bos_id` = <bos>), coordinates int [T, 3] -> [..., T, d]."""
        is_bos = (tokens == self.bos_id)[..., None]
        embedded = self.project(self.codes(tokens.clamp_max(self.bos_id - 1)))
        f, i, j = coordinates.unbind(-1)
        position = self.frame[f] + self.row[i] + self.column[j]
        return torch.where(is_bos, self.bos.to(embedded), embedded + position)


class Volume(nn.Module):
    """Index tables of one grid: what each position is fed, where it is, how layers see it."""

    before: Tensor
    coordinates: Tensor

    def __init__(self, config: DecoderConfig, grid: Grid) -> None:
        super().__init__()
        before = torch.from_numpy(predecessors(grid, config.shift)).long()
        self.register_buffer("before", before, persistent=False)
        coordinates = torch.from_numpy(grid.coordinates()).long()
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.windows = nn.ModuleList(
            BandedAttention(grid, extent, causal=True) for extent in config.window_extents
        )
        extents = config.window_extents
        self.window_of = [extents.index(config.layer_extent(n)) for n in range(config.layers)]

    def band(self, layer: int) -> nn.Module:
        """The self-attention of a layer."""
        return self.windows[self.window_of[layer]]


class NUWA(nn.Module):
    """The whole trainable model without its VQ-GAN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.text = TextEncoder(config.text, decoder.width)
        self.embedding = Embedding(config)
        self.blocks: Any = nn.ModuleList(DecoderBlock(decoder, n) for n in range(decoder.layers))
        self.head_norm = nn.LayerNorm(decoder.width, eps=_NORM_EPS)
        self.head = nn.Linear(decoder.width, config.image.codebook_size)
        self._volumes: dict[Grid, Volume] = {}

    def logits(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., K]."""
        return self.head(self.head_norm(x))

    def forward(self, tokens_BN: Tensor, text_BM: Tensor, grid: Grid) -> Tensor:
        """Teacher-forced logits [B, N, K] of every position of a volume.

        tokens_BN int64: the volume's tokens in raster order; text_BM int64: condition ids (may be
        cut to the longest text of the batch); grid: frames x height x width with N positions, at
        most the configured frames.
        """
        return self.volume_logits(tokens_BN, text_BM, self.volume(grid, tokens_BN.device))

    def volume_logits(self, tokens_BN: Tensor, text_BM: Tensor, volume: Volume) -> Tensor:
        """`forward` with the grid's tables at hand."""
        bos_B1 = tokens_BN.new_full((tokens_BN.shape[0], 1), self.config.bos)
        fed_BN = torch.cat([tokens_BN, bos_B1], dim=1)[:, volume.before]  # -1 is the <bos>
        x_BNd = self.embedding(fed_BN, volume.coordinates)
        memory_BMd, mask = self.text(text_BM), self.text.mask(text_BM)
        heads = self.config.decoder.heads
        for layer, block in enumerate(self.blocks):
            q, k, v = block.self_project(x_BNd)
            attended = volume.band(layer)(q, k, v, block.bias, heads)
            x_BNd = block.after_self(x_BNd, attended)
            k, v = block.cross_memory(memory_BMd)
            x_BNd = block.after_cross(x_BNd, _dense(block.cross_query(x_BNd), k, v, mask, heads))
        return self.logits(x_BNd)

    def volume(self, grid: Grid, device: torch.device | None = None) -> Volume:
        """The tables of a grid, made once."""
        if grid not in self._volumes:
            self._volumes[grid] = Volume(self.config.decoder, grid).to(device)
        return self._volumes[grid]


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Attention of [B, N, d] on [B, M, d] with an optional boolean mask [B, 1, 1, M]."""
    batch, length, width = query.shape
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, length, width)
