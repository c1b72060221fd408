"""Calls of the operators for tests and benchmarks: drawn, stored, and done in plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nuwa.spec.reference import cached_nearby_attention, nearby_attention

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int
    slots: int
    entries: int
    neighbours: int
    heads: int
    head_dim: int
    bias: bool = False


SIZES = (
    Sizes(1, 1, 1, 1, 1, 32),
    Sizes(1, 1, 27, 27, 4, 64, bias=True),
    Sizes(7, 3, 40, 14, 2, 128),
    Sizes(16, 2, 64, 63, 8, 32, bias=True),
    Sizes(33, 4, 90, 27, 20, 64),
    Sizes(5, 1, 300, 250, 3, 64, bias=True),
)
# Of the mean over neighbours, whose values are about 1: half a unit in the last place of the
# storage, and what sums in fp32 lose.
TOLERANCES = {"fp32": 2e-6, "fp16": 2**-11, "bf16": 2**-8}


def drawn(sizes: Sizes, seed: int = 0, writes: bool = True) -> Tensors:
    """A call: a fifth of the neighbours masked, a row with none, some rows that do not write."""
    draw = np.random.default_rng(seed)
    width = sizes.heads * sizes.head_dim
    made = {
        "query": draw.standard_normal((sizes.rows, width)) * 2,
        "key": draw.standard_normal((sizes.slots, sizes.entries, width)),
        "value": draw.standard_normal((sizes.slots, sizes.entries, width)),
        "slot": draw.integers(0, sizes.slots, sizes.rows).astype(np.int32),
        "neighbours": np.stack(
            [draw.permutation(sizes.entries)[: sizes.neighbours] for _ in range(sizes.rows)]
        ).astype(np.int32),
    }
    made["neighbours"][draw.random(made["neighbours"].shape) < 0.2] = -1
    made["neighbours"][sizes.rows // 2] = -1 if sizes.rows > 1 else 0
    if sizes.bias:
        made["bias"] = draw.standard_normal((sizes.heads, sizes.neighbours))
    if writes:
        for name in ("key_new", "value_new"):
            made[name] = draw.standard_normal((sizes.rows, width))
        index = np.full(sizes.rows, -1, np.int32)
        for slot in range(sizes.slots):
            (rows,) = np.nonzero(made["slot"] == slot)
            rows = rows[: sizes.entries]
            index[rows] = draw.permutation(sizes.entries)[: len(rows)]
        made["write_index"] = np.where(draw.random(sizes.rows) < 0.8, index, -1).astype(np.int32)
    return made


def stored(native, tensors: Tensors, storage: str) -> tuple[Tensors, Tensors]:
    """As the call takes them, and what that is in f64."""
    kept: Tensors = {}
    meant: Tensors = {}
    for name, array in tensors.items():
        if array.dtype == np.int32:
            kept[name] = meant[name] = array
        else:
            kept[name], back = native.stored(array, storage)
            meant[name] = back.astype(np.float64)
    return kept, meant


def read(array: np.ndarray, storage: str) -> np.ndarray:
    """What is stored, in f32."""
    if storage == "fp32":
        return array
    bits = array.astype(np.uint32)
    return (
        bits.astype(np.uint16).view(np.float16).astype(np.float32)
        if storage == "fp16"
        else (bits << 16).view(np.float32)
    )


def plain_attention(tensors: Tensors, storage: str, heads: int) -> np.ndarray:
    """f64 [T, d]: the call `tensors`, in f64 as `stored` gives them, as one writes it in PyTorch.

    Scores, softmax and sums are in the storage's type, on a CPU. The yardstick of our errors.
    """
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    neighbours = torch.from_numpy(tensors["neighbours"]).long()
    slot = torch.from_numpy(tensors["slot"]).long()[:, None]

    def part(name: str) -> Any:
        return torch.from_numpy(tensors[name]).to(kind)

    query, key, value = part("query"), part("key"), part("value")
    if "write_index" in tensors:
        index = torch.from_numpy(tensors["write_index"]).long()
        writes = index >= 0
        key[slot[writes, 0], index[writes]] = part("key_new")[writes]
        value[slot[writes, 0], index[writes]] = part("value_new")[writes]
    hidden_Tn = neighbours < 0
    q_Th1c, k_Thnc, v_Thnc = (
        each.unflatten(-1, (heads, -1)).transpose(1, 2)
        for each in (
            query[:, None],
            key[slot, neighbours.clamp_min(0)],
            value[slot, neighbours.clamp_min(0)],
        )
    )
    scores_Th1n = q_Th1c @ k_Thnc.transpose(-1, -2) / (query.shape[1] // heads) ** 0.5
    if "bias" in tensors:
        scores_Th1n = scores_Th1n + part("bias")[:, None]
    scores_Th1n = scores_Th1n.masked_fill(hidden_Tn[:, None, None], -torch.inf)
    out_Td = (scores_Th1n.softmax(-1) @ v_Thnc).flatten(1)
    return out_Td.masked_fill(hidden_Tn.all(1)[:, None], 0).double().numpy()


def exact(tensors: Tensors, heads: int) -> tuple[np.ndarray, ...]:
    """What the reference gives for a call in f64: out, and both caches if it writes."""
    if "write_index" not in tensors:
        return (nearby_attention(**tensors, heads=heads),)
    given = {{"key": "key_cache", "value": "value_cache"}.get(n, n): t for n, t in tensors.items()}
    return cached_nearby_attention(**given, heads=heads)


def errors(out: np.ndarray, meant: Tensors, storage: str, heads: int) -> tuple[float, float]:
    """The greatest of `out`, as stored, and that of plain PyTorch."""
    wanted = exact(meant, heads)[0]
    plain = plain_attention(meant, storage, heads)
    return tuple(float(np.abs(made - wanted).max()) for made in (read(out, storage), plain))
