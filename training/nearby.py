"""3D nearby attention in PyTorch: the two operators for decoding, and the fast path for training.

`torch.ops.nuwa.*` are the operators of the bundle (spec/reference.py says what they compute);
`BandedAttention` computes the same self-attention for whole volumes, frame by frame as dense
blocks, which on CPUs and GPUs alike is many times faster than gathering neighbours.

Legend: T positions, S slots, R entries, n neighbours, d = heads * head_dim (H * e); for volumes
B batch, N = F * C positions (F frames of C cells), P key frames in a band.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from nuwa.spec.grid import Extent, Grid, window_offsets

_NEVER = -1e30  # finite: a softmax over masked entries alone must not give NaN


@torch.library.custom_op("nuwa::nearby_attention", mutates_args=())
def nearby_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Tensor,
    neighbours: Tensor,
    bias: Tensor | None,
    heads: int,
) -> Tensor:
    """query [T,d], key, value [S,R,d], slot [T], neighbours [T,n], bias [heads,n] -> [T,d]."""
    positions, width = query.shape
    count = neighbours.shape[1]
    valid_Tn = neighbours >= 0
    entry_Tn = slot[:, None].long() * key.shape[1] + neighbours.clamp_min(0).long()
    key_TnHe = key.reshape(-1, width)[entry_Tn].view(positions, count, heads, -1).float()
    value_TnHe = value.reshape(-1, width)[entry_Tn].view(positions, count, heads, -1).float()
    query_THe = query.view(positions, heads, -1).float() / math.sqrt(width // heads)
    scores_THn = torch.einsum("the,tnhe->thn", query_THe, key_TnHe)
    if bias is not None:
        scores_THn = scores_THn + bias.float()
    scores_THn = scores_THn.masked_fill(~valid_Tn[:, None, :], _NEVER)
    weights_THn = scores_THn.softmax(dim=-1) * valid_Tn.any(dim=1)[:, None, None]
    return torch.einsum("thn,tnhe->the", weights_THn, value_TnHe).reshape(query.shape).to(query)


@nearby_attention.register_fake
def _(query, key, value, slot, neighbours, bias, heads):
    return torch.empty_like(query)


@torch.library.custom_op("nuwa::cached_nearby_attention", mutates_args=())
def cached_nearby_attention(
    query: Tensor,
    key_new: Tensor,
    value_new: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot: Tensor,
    write_index: Tensor,
    neighbours: Tensor,
    bias: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes key_new, value_new [T,d] at (slot, write_index >= 0), attends, returns new caches."""
    keep = write_index >= 0
    place = (slot[keep].long(), write_index[keep].long())
    key_cache = key_cache.index_put(place, key_new[keep])
    value_cache = value_cache.index_put(place, value_new[keep])
    out = nearby_attention(query, key_cache, value_cache, slot, neighbours, bias, heads)
    return out, key_cache, value_cache


@cached_nearby_attention.register_fake
def _(
    query,
    key_new,
    value_new,
    key_cache,
    value_cache,
    slot,
    write_index,
    neighbours,
    bias,
    heads,
):
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)


class BandedAttention(nn.Module):
    """3DNA of a whole volume: each frame against the frames its window reaches.

    Of the volume with itself, or with another volume of the same grid. Holds index tables only; the
    relative-position bias [heads, n] comes from the caller, columns in `window_offsets` order.
    """

    offset: Tensor
    outside: Tensor
    frames: Tensor
    missing: Tensor

    def __init__(self, grid: Grid, extent: Extent, *, causal: bool) -> None:
        super().__init__()
        extent = extent.resolve(grid)
        offsets = window_offsets(extent, causal=causal)
        cells = grid.height * grid.width
        steps = np.unique(offsets[:, 0])  # frame offsets of the band
        steps = steps[np.abs(steps) < grid.frames]
        table = np.full((cells, len(steps), cells), -1, np.int64)
        for index, (df, di, dj) in enumerate(offsets):
            if abs(df) >= grid.frames:
                continue
            for i in range(max(0, -di), min(grid.height, grid.height - di)):
                for j in range(max(0, -dj), min(grid.width, grid.width - dj)):
                    query, key = i * grid.width + j, (i + di) * grid.width + j + dj
                    table[query, df - steps[0], key] = index
        frames = np.arange(grid.frames)[:, None] + steps[None, :]
        inside = (frames >= 0) & (frames < grid.frames)
        self.grid = grid
        self._buffer("offset", table.reshape(cells, -1).clip(0))
        self._buffer("outside", table.reshape(cells, -1) < 0)
        self._buffer("frames", frames.clip(0, grid.frames - 1))
        self._buffer("missing", np.repeat(~inside, cells, axis=1))

    def _buffer(self, name: str, array: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(array), persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        heads: int,
        shared: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """query, key, value [B, N, d]; bias [heads, n] or None -> [B, N, d].

        shared: keys and values [B, M, d] that every position attends to as well, in the same
        softmax, and a mask bool [B, 1, 1, M], True = may be attended to.
        """
        batch, _, width = query.shape
        frames, band = self.frames.shape
        cells, size = self.offset.shape[0], width // heads
        query_BFHCe = query.view(batch, frames, cells, heads, size).transpose(2, 3)
        key_BFHKe = self._band(key, heads)
        value_BFHKe = self._band(value, heads)
        scores_BFHCK = query_BFHCe @ key_BFHKe.transpose(-1, -2)
        mask_HCK = torch.zeros((), device=query.device).masked_fill(self.outside, _NEVER)
        if bias is not None:
            mask_HCK = mask_HCK + bias.float()[:, self.offset]
        missing_F11K = self.missing[:, None, None, :]
        mask_FHCK = (mask_HCK + torch.zeros_like(missing_F11K, dtype=torch.float32)).masked_fill(
            missing_F11K, _NEVER
        )
        scores_BFHCK = scores_BFHCK.float() / math.sqrt(size) + mask_FHCK
        if shared is not None:
            shared_key, shared_value, mask_B11M = shared
            keys_B1HMe, values_B1HMe = (
                x.unflatten(-1, (heads, size)).transpose(1, 2)[:, None]
                for x in (shared_key, shared_value)
            )
            shared_BFHCM = (query_BFHCe @ keys_B1HMe.transpose(-1, -2)).float() / math.sqrt(size)
            if mask_B11M is not None:
                shared_BFHCM = shared_BFHCM.masked_fill(~mask_B11M[:, None], _NEVER)
            scores_BFHCK = torch.cat([scores_BFHCK, shared_BFHCM], dim=-1)
        weights_BFHCK = scores_BFHCK.softmax(dim=-1).to(value.dtype)
        band_keys = key_BFHKe.shape[-2]
        out_BFHCe = weights_BFHCK[..., :band_keys] @ value_BFHKe
        if shared is not None:
            out_BFHCe = out_BFHCe + weights_BFHCK[..., band_keys:] @ values_B1HMe
        return out_BFHCe.transpose(2, 3).reshape(batch, frames * cells, width)

    def _band(self, x: Tensor, heads: int) -> Tensor:
        """[B, N, d] -> [B, F, H, P*C, e]: the frames that each frame's window reaches."""
        batch, _, width = x.shape
        frames, band = self.frames.shape
        x_BFCd = x.view(batch, frames, -1, width)
        x_BFKd = x_BFCd[:, self.frames].flatten(2, 3)
        return x_BFKd.view(batch, frames, -1, heads, width // heads).transpose(2, 3)
