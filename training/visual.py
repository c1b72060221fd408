"""The visual encoder: 3DNA over sketch tokens, or over the known tokens of a picture or clip.

Its output conditions the decoder through cross attention, beside the text. Knows nothing of
decoding order.

Legend: B batch, N positions of a volume, d decoder width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig, VisualConfig
from nuwa.spec.grid import window_offsets

NORM_EPS = 1e-5


class VisualEmbedding(nn.Module):
    """Code vectors of either codebook, projected, or the vector of a hidden token; plus positions.

    Ids: picture codes, then sketch codes, then hidden tokens by known.hidden_edges, whose vectors
    are one of all hidden tokens and one for each edge that is visible.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        grid, d = config.decoder.grid, config.decoder.width
        self.pictures, self.hidden_id = config.image.codebook_size, config.hidden
        self.codes = nn.Embedding(config.image.codebook_size, config.image.embedding_dim)
        self.project = nn.Linear(config.image.embedding_dim, d)
        sketch = config.sketch
        self.sketches = (
            None if sketch is None else nn.Embedding(sketch.codebook_size, sketch.embedding_dim)
        )
        self.project_sketch = None if sketch is None else nn.Linear(sketch.embedding_dim, d)
        self.hidden = nn.Parameter(torch.randn(d) * 0.02)
        assert config.visual is not None, "the config has a visual encoder"
        levels = config.visual.edge_levels
        self.edges = nn.Parameter(torch.zeros(4, levels - 1, d)) if levels > 1 else None
        self.frame = nn.Parameter(torch.randn(grid.frames, d) * 0.02)
        self.row = nn.Parameter(torch.randn(grid.height, d) * 0.02)
        self.column = nn.Parameter(torch.randn(grid.width, d) * 0.02)

    def table(self) -> Tensor:
        """[ids, d]: the vector of every id, without its position."""
        parts = [self.project(self.codes.weight)]
        if self.sketches is not None and self.project_sketch is not None:
            parts.append(self.project_sketch(self.sketches.weight))
        hidden = self.hidden[None]
        if self.edges is not None:
            for edge in self.edges:  # the first one is the highest digit
                visible = F.pad(edge, (0, 0, 1, 0))
                hidden = (hidden[:, None] + visible).flatten(0, 1)
        return torch.cat([*parts, hidden.to(parts[0])])

    def forward(self, ids: Tensor, coordinates: Tensor) -> Tensor:
        """ids int [..., N], coordinates int [N, 3] -> [..., N, d]."""
        f, i, j = coordinates.unbind(-1)
        position = self.frame[f] + self.row[i] + self.column[j]
        return F.embedding(ids, self.table()) + position


class VisualBlock(nn.Module):
    """Pre-LN 3DNA and GEGLU feed-forward with LayerScale; no bias on q, k, v."""

    def __init__(self, config: VisualConfig, d: int, neighbours: int) -> None:
        super().__init__()
        inner = config.ff_multiplier * d
        self.self_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.self_qkv = nn.Linear(d, 3 * d, bias=False)
        self.self_out = nn.Linear(d, d)
        self.ff_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.ff_in = nn.Linear(d, 2 * inner)
        self.ff_out = nn.Linear(inner, d)
        self.self_scale = nn.Parameter(torch.full((d,), 0.1))
        self.ff_scale = nn.Parameter(torch.full((d,), 0.1))
        bias = nn.Parameter(torch.zeros(config.heads, neighbours))
        self.bias = bias if config.relative_bias else None

    def self_project(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., d] -> query, key, value [..., d]."""
        return self.self_qkv(self.self_norm(x)).chunk(3, dim=-1)

    def after_self(self, x: Tensor, attended: Tensor) -> Tensor:
        """Adds the attention's and then the feed-forward's result."""
        x = x + self.self_scale * self.self_out(attended)
        hidden, gate = self.ff_in(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff_scale * self.ff_out(hidden * F.gelu(gate))


class VisualEncoder(nn.Module):
    """Ids of a volume -> its memory for cross attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.visual is not None, "the config has a visual encoder"
        visual, d = config.visual, config.decoder.width
        extent = visual.extent.resolve(config.decoder.grid)
        count = len(window_offsets(extent, causal=False))
        self.heads, self.columns = visual.heads, visual_columns(config)
        self.embedding = VisualEmbedding(config)
        blocks = (VisualBlock(visual, d, count) for _ in range(visual.layers))
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.project = nn.Linear(d, d)

    def forward(self, ids_BN: Tensor, coordinates_N3: Tensor, attention: nn.Module) -> Tensor:
        """[B, N, d]; attention: the BandedAttention of the volume's grid and this window."""
        x_BNd = self.embedding(ids_BN, coordinates_N3)
        for block in self.blocks:
            q, k, v = block.self_project(x_BNd)
            x_BNd = block.after_self(x_BNd, attention(q, k, v, block.bias, self.heads))
        return self.memory(x_BNd)

    def memory(self, x: Tensor) -> Tensor:
        """[..., d] after the last block -> [..., d], what cross attention reads."""
        return self.project(self.norm(x))
