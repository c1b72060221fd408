"""The kernels' arithmetic, lane by lane on a CPU, against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from .calls import SIZES, TOLERANCES, Sizes, drawn, errors, exact, read, stored
from .native_attention import STORAGES, NativeAttention


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return NativeAttention(tmp_path_factory.mktemp("attention"))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_the_references(native, sizes, storage):
    kept, meant = stored(native, drawn(sizes, writes=False), storage)
    out = read(native(storage, heads=sizes.heads, **kept), storage)
    (wanted,) = exact(meant, sizes.heads)
    assert np.abs(out - wanted).max() <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())
    assert sizes.rows == 1 or not out[sizes.rows // 2].any()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", SIZES)
def test_what_a_call_writes_is_seen_by_all_its_rows(native, sizes, storage):
    for seed in range(3):
        kept, meant = stored(native, drawn(sizes, seed), storage)
        out = read(native(storage, heads=sizes.heads, **kept), storage)
        wanted, key, value = exact(meant, sizes.heads)
        assert np.abs(out - wanted).max() <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())
        assert (read(kept["key"], storage) == key).all()
        assert (read(kept["value"], storage) == value).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("writes", [False, True])
def test_errors_are_at_most_twice_those_of_plain_pytorch(native, sizes, storage, writes):
    pytest.importorskip("torch")
    ours = plain = 0.0
    for seed in range(5):
        kept, meant = stored(native, drawn(sizes, seed, writes), storage)
        out = native(storage, heads=sizes.heads, **kept)
        own, theirs = errors(out, meant, storage, sizes.heads)
        ours, plain = max(ours, own), max(plain, theirs)
    assert ours <= 2 * plain


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
