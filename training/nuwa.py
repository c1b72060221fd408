"""NÜWA: text and visual encoders and a 3DNA decoder over an image's or clip's tokens (2111.12417).

`forward` is teacher-forced training over whole volumes; decode.py runs the same weights position by
position with a cache. Knows nothing of pixels, losses or sampling.

Legend: B batch, M text length, N positions of a volume, d decoder width, K codebook size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig, TextConfig
from nuwa.spec.grid import Grid, predecessors

from .nearby import BandedAttention
from .visual import NORM_EPS, VisualEncoder


class TextBlock(nn.Module):
    """Pre-LN transformer block with full attention, as in CLIP's text encoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ff_norm = nn.LayerNorm(width, eps=NORM_EPS)
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
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
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

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        config = model.decoder
        d, inner = config.width, config.ff_multiplier * config.width
        self.self_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.self_qkv = nn.Linear(d, 3 * d, bias=False)
        self.self_out = nn.Linear(d, d)
        self.cross_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.cross_q = nn.Linear(d, d, bias=False)
        self.cross_kv = nn.Linear(d, 2 * d, bias=False)
        self.cross_out = nn.Linear(d, d)
        self.ff_norm = nn.LayerNorm(d, eps=NORM_EPS)
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
        biased = model.visual is not None and model.visual.relative_bias
        self.cross_bias = (
            nn.Parameter(torch.zeros(config.heads, visual_columns(model))) if biased else None
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

    def cross_bias_table(self) -> Tensor | None:
        """[heads, v + 1]: the bias of every visual column; the last is that of all text, zero."""
        return None if self.cross_bias is None else F.pad(self.cross_bias, (0, 1))

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
        """tokens int [..., T] (`bos_id` = <bos>), coordinates int [..., T, 3] -> [..., T, d]."""
        is_bos = (tokens == self.bos_id)[..., None]
        embedded = self.project(self.codes(tokens.clamp_max(self.bos_id - 1)))
        f, i, j = coordinates.unbind(-1)
        position = self.frame[f] + self.row[i] + self.column[j]
        return torch.where(is_bos, self.bos.to(embedded), embedded + position)


class Volume(nn.Module):
    """Index tables of one grid: what each position is fed, where it is, how layers see it."""

    before: Tensor
    coordinates: Tensor

    def __init__(self, model: ModelConfig, grid: Grid) -> None:
        super().__init__()
        config = model.decoder
        before = torch.from_numpy(predecessors(grid, config.shift)).long()
        self.register_buffer("before", before, persistent=False)
        coordinates = torch.from_numpy(grid.coordinates()).long()
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.windows = nn.ModuleList(
            BandedAttention(grid, extent, causal=True) for extent in config.window_extents
        )
        extents = config.window_extents
        self.window_of = [extents.index(config.layer_extent(n)) for n in range(config.layers)]
        self.visual: nn.Module | None = None
        self.cross: nn.Module | None = None
        if model.visual is not None:
            inside, across = model.visual.extent, model.visual.cross
            self.visual = BandedAttention(grid, inside.resolve(config.grid), causal=False)
            self.cross = BandedAttention(grid, across.resolve(config.grid), causal=False)

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
        self.visual = None if config.visual is None else VisualEncoder(config)
        self.embedding = Embedding(config)
        self.blocks: Any = nn.ModuleList(DecoderBlock(config, n) for n in range(decoder.layers))
        self.head_norm = nn.LayerNorm(decoder.width, eps=NORM_EPS)
        self.head = nn.Linear(decoder.width, config.image.codebook_size)
        self._volumes: dict[Grid, Volume] = {}

    def logits(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., K]."""
        return self.head(self.head_norm(x))

    def forward(
        self,
        tokens_BN: Tensor,
        text_BM: Tensor,
        grid: Grid,
        visual_VN: Tensor | None = None,
        time_B: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits [B, N, K] of every position of a volume.

        tokens_BN int64: the volume's tokens in raster order; text_BM int64: condition ids (may be
        cut to the longest text of the batch); grid: frames x height x width with N positions, at
        most the configured frames; visual_VN int64: the visual encoder's ids for the first V rows
        of the batch, the others have none; time_B int64: the time position of each row's first
        frame, from where positions count on cyclically (0 if absent).
        """
        volume = self.volume(grid, tokens_BN.device)
        return self.volume_logits(tokens_BN, text_BM, volume, visual_VN, time_B)

    def volume_logits(
        self,
        tokens_BN: Tensor,
        text_BM: Tensor,
        volume: Volume,
        visual_VN: Tensor | None = None,
        time_B: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the grid's tables at hand."""
        bos_B1 = tokens_BN.new_full((tokens_BN.shape[0], 1), self.config.bos)
        fed_BN = torch.cat([tokens_BN, bos_B1], dim=1)[:, volume.before]  # -1 is the <bos>
        x_BNd = self.embedding(fed_BN, self._coordinates(volume, time_B))
        memory_BMd, mask = self.text(text_BM), self.text.mask(text_BM)
        seen_VNd = self._see(visual_VN, volume)
        heads = self.config.decoder.heads
        for layer, block in enumerate(self.blocks):
            q, k, v = block.self_project(x_BNd)
            attended = volume.band(layer)(q, k, v, block.bias, heads)
            x_BNd = block.after_self(x_BNd, attended)
            q, (k, v) = block.cross_query(x_BNd), block.cross_memory(memory_BMd)
            if seen_VNd is None:
                attended = _dense(q, k, v, mask, heads)
            else:
                attended = _cross(volume, block, seen_VNd, q, k, v, mask, heads)
            x_BNd = block.after_cross(x_BNd, attended)
        return self.logits(x_BNd)

    def _coordinates(self, volume: Volume, time_B: Tensor | None) -> Tensor:
        if time_B is None:
            return volume.coordinates
        frames = self.config.decoder.grid.frames
        f_N, i_N, j_N = volume.coordinates.unbind(-1)
        f_BN = (f_N + time_B[:, None]) % frames
        return torch.stack(torch.broadcast_tensors(f_BN, i_N, j_N), dim=-1)

    def _see(self, visual_VN: Tensor | None, volume: Volume) -> Tensor | None:
        """[V, N, d]: what the visual encoder makes of its ids."""
        if visual_VN is None or not len(visual_VN):
            return None
        assert self.visual is not None, "this model has no visual encoder"
        return self.visual(visual_VN, volume.coordinates, volume.visual)

    def volume(self, grid: Grid, device: torch.device | None = None) -> Volume:
        """The tables of a grid, made once."""
        if grid not in self._volumes:
            self._volumes[grid] = Volume(self.config, grid).to(device)
        return self._volumes[grid]


def _cross(
    volume: Volume,
    block: DecoderBlock,
    seen_VNd: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
) -> Tensor:
    """The first V rows attend to their visual memory and their text at once, the rest to text."""
    assert volume.cross is not None, "a model with a visual encoder has a cross window"
    count = len(seen_VNd)
    first, rest_mask = (mask, mask) if mask is None else (mask[:count], mask[count:])
    near, text = block.cross_memory(seen_VNd), (k[:count], v[:count], first)
    seen = volume.cross(q[:count], *near, block.cross_bias, heads, shared=text)
    if count == len(q):
        return seen
    rest = _dense(q[count:], k[count:], v[count:], rest_mask, heads)
    return torch.cat([seen, rest])


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Attention of [B, N, d] on [B, M, d] with an optional boolean mask [B, 1, 1, M]."""
    batch, length, width = query.shape
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, length, width)
