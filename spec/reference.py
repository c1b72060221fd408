"""The two `nuwa` operators as slow, obvious loops in numpy: the judge of every other version.

NearbyAttention and CachedNearbyAttention, operator domain `nuwa`, version 1.

Legend: T positions in a call, S cache slots, R entries a slot, n neighbours, d = heads * head_dim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Int = npt.NDArray[np.int32]


def nearby_attention(
    query: Array,
    key: Array,
    value: Array,
    slot: Int,
    neighbours: Int,
    bias: Array | None = None,
    *,
    heads: int,
) -> Array:
    """query [T,d], key and value [S,R,d], slot [T], neighbours [T,n], bias [heads,n] -> [T,d].

    out[t] = softmax over the valid n of (q . k / sqrt(head_dim) + bias), applied to v, per head.
    A neighbour below 0 is masked; a row without any valid one gives zeros. Computed in float64.
    """
    width = query.shape[1] // heads
    out = np.zeros(query.shape, np.float64)
    for t in range(query.shape[0]):
        valid = [c for c in range(neighbours.shape[1]) if neighbours[t, c] >= 0]
        if not valid:
            continue
        keys = key[slot[t], neighbours[t, valid]].astype(np.float64)
        values = value[slot[t], neighbours[t, valid]].astype(np.float64)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = keys[:, part] @ query[t, part].astype(np.float64) / np.sqrt(width)
            if bias is not None:
                scores = scores + bias[head, valid]
            weights = np.exp(scores - scores.max())
            out[t, part] = weights @ values[:, part] / weights.sum()
    return out.astype(query.dtype)


def cached_nearby_attention(
    query: Array,
    key_new: Array,
    value_new: Array,
    key_cache: Array,
    value_cache: Array,
    slot: Int,
    write_index: Int,
    neighbours: Int,
    bias: Array | None = None,
    *,
    heads: int,
) -> tuple[Array, Array, Array]:
    """Writes key_new, value_new [T,d] at (slot, write_index), then attends as nearby_attention.

    write_index below 0: no write. Returns out [T,d] and both updated caches [S,R,d].
    """
    key_cache, value_cache = key_cache.copy(), value_cache.copy()
    for t in range(query.shape[0]):
        if write_index[t] >= 0:
            key_cache[slot[t], write_index[t]] = key_new[t]
            value_cache[slot[t], write_index[t]] = value_new[t]
    out = nearby_attention(query, key_cache, value_cache, slot, neighbours, bias, heads=heads)
    return out, key_cache, value_cache
