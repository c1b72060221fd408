"""Plugins on a GPU: what `enqueue` computes on device memory, against the reference."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import numpy as np
import pytest

from nuwa.spec.reference import cached_nearby_attention, nearby_attention

from .native_attention import STORAGES, NativeAttention
from .plugin_harness import INPUTS, Harness, built_library, tensors
from .test_attention import SIZES, TOLERANCES, Sizes, drawn, read, stored

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def harness():
    return Harness(built_library("80-real;86-real;87-real;89-real;90-real;100-real;120"))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return NativeAttention(tmp_path_factory.mktemp("attention"))


def enqueue(harness, name, storage, sizes, kept, *, in_place=True, tactic=0):
    """The outputs, as stored."""
    given = tensors(
        name,
        storage,
        rows=sizes.rows,
        slots=sizes.slots,
        entries=sizes.entries,
        columns=sizes.neighbours,
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        bias=sizes.bias,
    )
    names = [each for each in INPUTS[name] if sizes.bias or each != "bias"]
    inputs = [np.ascontiguousarray(kept[each]) for each in names]
    outputs = [np.empty_like(kept["query"])]
    if name == "CachedNearbyAttention":
        outputs += [np.empty_like(kept["key"]), np.empty_like(kept["value"])]
    made = harness.create(name, sizes.heads)
    assert harness.c.harness_set_tactic(made, tactic) == 0
    plugin = c_void_p(harness.c.harness_attach(made))  # what runs in TensorRT is a copy
    harness.c.harness_delete(made)
    status = harness.c.harness_enqueue(
        plugin,
        *given.arguments,
        (c_void_p * len(inputs))(*(array.ctypes.data for array in inputs)),
        len(outputs),
        (c_void_p * len(outputs))(*(array.ctypes.data for array in outputs)),
        (c_int64 * len(outputs))(*(array.nbytes for array in outputs)),
        ctypes.c_int(in_place),
    )
    harness.c.harness_delete(plugin)
    assert status == 0, harness.log()
    return outputs


MANY = (
    *SIZES,
    Sizes(98, 1, 800, 27, 20, 64),
    Sizes(700, 3, 900, 27, 4, 32, bias=True),  # more rows than are fused by themselves
)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", MANY)
def test_attention(harness, native, sizes, storage):
    kept, meant = stored(native, drawn(sizes, writes=False), storage)
    (out,) = enqueue(harness, "NearbyAttention", storage, sizes, kept)
    wanted = nearby_attention(**meant, heads=sizes.heads)
    error = np.abs(read(native, out, storage) - wanted).max()
    assert error <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", MANY)
@pytest.mark.parametrize(("tactic", "in_place"), [(0, True), (1, True), (2, True), (0, False)])
def test_cached_attention(harness, native, sizes, storage, tactic, in_place):
    kept, meant = stored(native, drawn(sizes, seed=1), storage)
    how = {"tactic": tactic, "in_place": in_place}
    out, key, value = enqueue(harness, "CachedNearbyAttention", storage, sizes, kept, **how)
    cache = {name: meant.pop(name) for name in ("key", "value")}
    wanted, *caches = cached_nearby_attention(
        **meant, key_cache=cache["key"], value_cache=cache["value"], heads=sizes.heads
    )
    error = np.abs(read(native, out, storage) - wanted).max()
    assert error <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())
    for made, expected in zip((key, value), caches, strict=True):
        assert (read(native, made, storage) == expected).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_does_not_depend_on_the_others_nor_on_the_tactic(harness, native, storage):
    sizes = Sizes(40, 3, 90, 27, 4, 64, bias=True)
    kept, _ = stored(native, drawn(sizes, seed=2), storage)
    name = "CachedNearbyAttention"
    outs = [enqueue(harness, name, storage, sizes, kept, tactic=tactic)[0] for tactic in (1, 2)]
    assert (outs[0] == outs[1]).all()
    _, key, value = enqueue(harness, name, storage, sizes, kept)
    later = kept | {"key": key, "value": value}
    for row in (0, 17, 39):
        own = later | {each: later[each][row : row + 1] for each in ("query", "slot", "neighbours")}
        one = Sizes(1, 3, 90, 27, 4, 64, bias=True)
        (alone,) = enqueue(harness, "NearbyAttention", storage, one, own)
        assert (alone[0] == outs[0][row]).all()
