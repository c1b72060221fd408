"""The kernels' arithmetic, lane by lane on a CPU, against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nuwa.spec.reference import cached_nearby_attention, nearby_attention

from .native_attention import STORAGES, NativeAttention


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


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return NativeAttention(tmp_path_factory.mktemp("attention"))


def drawn(sizes: Sizes, seed: int = 0, writes: bool = True) -> dict[str, np.ndarray]:
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


def stored(native, tensors: dict[str, np.ndarray], storage: str):
    """As the call takes them, and what that is in f64."""
    kept, meant = {}, {}
    for name, array in tensors.items():
        if array.dtype == np.int32:
            kept[name] = meant[name] = array
        else:
            kept[name], back = native.stored(array, storage)
            meant[name] = back.astype(np.float64)
    return kept, meant


def read(native, array: np.ndarray, storage: str) -> np.ndarray:
    if storage == "fp32":
        return array
    bits = array.astype(np.uint32)
    return (
        bits.astype(np.uint16).view(np.float16).astype(np.float32)
        if storage == "fp16"
        else (bits << 16).view(np.float32)
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_the_references(native, sizes, storage):
    kept, meant = stored(native, drawn(sizes, writes=False), storage)
    out = read(native, native(storage, heads=sizes.heads, **kept), storage)
    wanted = nearby_attention(**meant, heads=sizes.heads)
    assert np.abs(out - wanted).max() <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())
    assert sizes.rows == 1 or not out[sizes.rows // 2].any()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", SIZES)
def test_what_a_call_writes_is_seen_by_all_its_rows(native, sizes, storage):
    for seed in range(3):
        kept, meant = stored(native, drawn(sizes, seed), storage)
        out = read(native, native(storage, heads=sizes.heads, **kept), storage)
        key, value = meant.pop("key"), meant.pop("value")
        wanted, key, value = cached_nearby_attention(
            **meant, key_cache=key, value_cache=value, heads=sizes.heads
        )
        assert np.abs(out - wanted).max() <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())
        assert (read(native, kept["key"], storage) == key).all()
        assert (read(native, kept["value"], storage) == value).all()


def test_a_row_does_not_depend_on_the_others(native):
    sizes = Sizes(12, 3, 50, 27, 4, 64, bias=True)
    tensors = drawn(sizes, seed=3, writes=False)
    kept, _ = stored(native, tensors, "fp32")
    together = native("fp32", heads=4, **kept)
    for row in range(sizes.rows):
        own = {
            name: array[row : row + 1].copy() if name in ("query", "slot", "neighbours") else array
            for name, array in kept.items()
        }
        assert (native("fp32", heads=4, **own)[0] == together[row]).all()


def test_masked_entries_are_not_read(native):
    kept, _ = stored(native, drawn(Sizes(4, 1, 30, 20, 2, 32), writes=False), "fp32")
    seen = np.unique(kept["neighbours"][kept["neighbours"] >= 0])
    clean = native("fp32", heads=2, **kept)
    others = np.setdiff1d(np.arange(30), seen)
    assert len(others)
    kept["key"][:, others] = kept["value"][:, others] = np.nan
    assert (native("fp32", heads=2, **kept) == clean).all()


def test_numbers_that_are_none_are_not_hidden(native):
    kept, _ = stored(native, drawn(Sizes(2, 1, 9, 9, 1, 32), writes=False), "fp32")
    kept["query"][0, 3] = np.nan
    kept["neighbours"][0, 0] = 0
    assert np.isnan(native("fp32", heads=1, **kept)[0]).all()


@pytest.mark.parametrize("column", range(9))
def test_one_neighbour_that_is_no_number_is_enough(native, column):
    """Whichever group of lanes reads it, and if it is the only one."""
    kept, _ = stored(native, drawn(Sizes(1, 1, 9, 9, 1, 32), writes=False), "fp16")
    kept["query"][:] = 0x7E00
    kept["neighbours"][:] = -1
    kept["neighbours"][0, column] = 3
    assert np.isnan(native("fp16", heads=1, **kept).view(np.float16)).all()


def test_indices_from_outside_are_as_masked_ones(native):
    """TensorRT times kernels on made-up ones."""
    sizes = Sizes(6, 2, 20, 9, 1, 32)
    kept, _ = stored(native, drawn(sizes, seed=5), "fp32")
    wild = {name: array.copy() for name, array in kept.items()}
    wild["neighbours"][0, ::2] = [20, 2**31 - 1, -(2**31), 21, 999]
    kept["neighbours"][0, ::2] = -1
    wild["write_index"][1], kept["write_index"][1] = 20, -1
    wild["slot"][2] = 2
    kept["neighbours"][2], kept["write_index"][2] = -1, -1
    expected = native("fp32", heads=1, **kept)
    assert (native("fp32", heads=1, **wild) == expected).all()
    assert (wild["key"] == kept["key"]).all() and (wild["value"] == kept["value"]).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 48}, "head_dim is not 32, 64 or 128"),
        ({"neighbours": 8193, "entries": 8193}, "more than 8192 neighbours"),
    ],
)
def test_sizes_that_cannot_be_done_are_named(native, change, reason):
    sizes = dataclasses.replace(Sizes(2, 1, 4, 3, 2, 32), **change)
    kept, _ = stored(native, drawn(sizes, writes=False), "fp32")
    with pytest.raises(ValueError, match=reason):
        native("fp32", heads=2, **kept)


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_numbers_are_stored_as_torch_does(native, storage):
    torch = pytest.importorskip("torch")
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind).float()
    every = every[~every.isnan()].sort().values
    finite = every[every.isfinite()].double()
    middles = ((finite[1:] + finite[:-1]) / 2).float()  # exact: one more bit
    near = torch.cat([torch.nextafter(middles, torch.tensor(s)) for s in (-1e38, 1e38)])
    values = torch.cat([every, middles, near, torch.tensor([65519.9, 65520.0, 3.4e38, -0.0])])
    bits, back = native.stored(values.numpy(), storage)
    wanted = values.to(kind)
    assert (bits == wanted.view(torch.int16).numpy().view(np.uint16)).all()
    assert (back == wanted.float().numpy()).all()
    _, back = native.stored(np.array([np.nan], np.float32), storage)
    assert np.isnan(back).all()
