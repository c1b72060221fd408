"""The plugin library: in real registries, and every method that TensorRT calls to build an engine.

Its kernels run on a GPU only, with `pytest -m gpu`.
"""

from __future__ import annotations

import subprocess
import sys
from ctypes import c_int, c_void_p

import numpy as np
import psutil
import pytest

from .plugin_harness import INPUTS, TYPES, Harness, built_library, tensors, visible

NAMES = tuple(INPUTS)
STORED = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def library():
    return built_library()


@pytest.fixture(scope="module")
def harness(library):
    return Harness(library)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def plugin(harness, name):
    made = harness.create(name)
    yield made
    harness.c.harness_delete(made)


REGISTRY = """
import sys
import numpy as np
import {package} as trt
registry = trt.get_plugin_registry()
handle = registry.load_library(sys.argv[1])
for name in ("NearbyAttention", "CachedNearbyAttention"):
    creator = registry.get_creator(name, "1", "nuwa")
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (name, "1", "nuwa")
    (field,) = creator.field_names
    assert (field.name, field.type) == ("heads", trt.PluginFieldType.INT32), field
    def make(number):
        field = trt.PluginField("heads", np.array([number], np.int32), trt.PluginFieldType.INT32)
        fields = trt.PluginFieldCollection([field])
        return creator.create_plugin("tested", fields, trt.TensorRTPhase.BUILD)
    assert make(4) is not None and make(0) is None
registry.deregister_library(handle)
assert registry.get_creator("NearbyAttention", "1", "nuwa") is None
print("TensorRT", trt.__version__)
"""


@pytest.mark.parametrize("package", ["tensorrt_lean_bindings", "tensorrt_rtx"])
def test_real_registries_take_the_library(library, package):
    """In a process of its own: two TensorRTs do not go into one."""
    pytest.importorskip(package)
    code = REGISTRY.format(package=package)
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "TensorRT" in done.stdout


def test_only_what_registries_look_for_is_visible(library):
    wanted = {"getCreators", "setLoggerFinder", "nuwa_plugin_abi_version"}
    assert visible(library) == wanted


def test_plugins_say_who_they_are(harness, name, plugin):
    identity = f"nuwa/{name}/1 {name}_heads4_abi1"
    assert harness.c.harness_identity(plugin).decode() == identity
    assert harness.c.harness_outputs(plugin) == harness.outputs(name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"field": None}, "the attribute heads is missing"),
        ({"field": "head"}, "the attribute heads is missing"),
        ({"heads": 4.0, "kind": "float32"}, "heads is not of a type for whole numbers"),
        ({"heads": [4, 4]}, "heads is not one number"),
        ({"heads": 0}, "heads 0 is not in [1, 4096]"),
        ({"heads": 2**40, "kind": "int64"}, "heads 1099511627776 is not in [1, 4096]"),
    ],
)
def test_a_wrong_attribute_is_named(harness, name, given, says):
    harness.log()
    assert harness.create(name, **given) is None
    assert harness.log() == f"1 nuwa::{name}: {says}\n"


def test_copies_and_what_an_engine_keeps_are_the_same_plugin(harness, name):
    plugin = harness.create(name, 20, "int64")
    assert plugin is not None
    copies = [
        harness.c.harness_clone(plugin),
        harness.c.harness_attach(plugin),
        harness.c.harness_round_trip(harness.creators[name], plugin),
    ]
    identity = harness.c.harness_identity(plugin)
    harness.c.harness_delete(plugin)  # they must not live on its memory
    for copy in copies:
        assert harness.c.harness_identity(_pointer(copy)) == identity
        again = harness.c.harness_round_trip(harness.creators[name], _pointer(copy))
        assert harness.c.harness_identity(_pointer(again)) == identity
        harness.c.harness_delete(_pointer(copy))
        harness.c.harness_delete(_pointer(again))


def _pointer(address: int):
    assert address
    return c_void_p(address)


def test_outputs_are_like_the_inputs_that_they_continue(harness, name, plugin):
    inputs, outputs = len(INPUTS[name]), harness.outputs(name)
    shapes = {
        "NearbyAttention": ("T d;S R d;S R d;T;T n;h n", "T d"),
        "CachedNearbyAttention": ("T d;T d;T d;S R d;S R d;T;T;T n;h n", "T d;S R d;S R d"),
    }
    given, made = shapes[name]
    assert harness.c.harness_output_shapes(plugin, given.encode(), outputs).decode() == made
    assert harness.c.harness_output_shapes(plugin, b"T d;S R d", outputs) is None
    for storage in STORED:
        types = tensors(name, storage).types
        kinds = (c_int * outputs)()
        assert not harness.c.harness_output_types(
            plugin, inputs, (c_int * inputs)(*types), outputs, kinds
        )
        assert list(kinds) == [TYPES[storage]] * outputs
    aliased = [harness.c.harness_aliased(plugin, output) for output in range(outputs)]
    assert aliased == ([-1] if outputs == 1 else [-1, 3, 4])


@pytest.mark.parametrize("bias", [False, True])
def test_types_that_fit_are_taken_and_no_others(harness, name, plugin, bias):
    outputs = harness.outputs(name)
    for storage in STORED:
        fitting = tensors(name, storage, bias=bias).types + [TYPES[storage]] * outputs
        assert harness.supports(plugin, name, fitting)
        for position, kind in enumerate(fitting):
            for other in set(TYPES.values()) - {kind}:
                types = [*fitting[:position], other, *fitting[position + 1 :]]
                assert not harness.supports(plugin, name, types)
            formats = [0] * len(fitting)
            formats[position] = 1
            assert not harness.supports(plugin, name, fitting, formats)
    for storage in ("int8", "int32"):
        types = tensors(name, storage, bias=bias).types + [TYPES[storage]] * outputs
        assert not harness.supports(plugin, name, types)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [-1, 1, 300])
def test_sizes_that_fit_are_taken(harness, name, plugin, rows, bias):
    for sizes in ({}, {"head_dim": 32}, {"head_dim": 128}, {"slots": -1, "columns": -1}):
        given = tensors(name, rows=rows, bias=bias, **sizes)
        assert harness.configure(plugin, name, given) == 0
        assert harness.shape_change(plugin, name, given) == 0
    assert harness.log() == ""


WRONG = [
    ({"query": (-1, 250)}, "query is 250 wide, which is not 4 heads of 32, 64 or 128"),
    ({"query": (-1, 192)}, "query is 192 wide, which is not 4 heads of 32, 64 or 128"),
    ({"query": (-1, 4, 64)}, "query has the shape [?, 4, 64], not one of 2 sizes"),
    ({"key": (4, 90, 128)}, "key and query differ in width: [4, 90, 128] and [?, 256]"),
    ({"value": (4, 80, 256)}, "value and key differ: [4, 80, 256] and [4, 90, 256]"),
    ({"rows": 5, "slot": (4,)}, "slot and query differ in rows: [4] and [5, 256]"),
    ({"rows": 5, "neighbours": (4, 27)}, "neighbours and query differ in rows: [4, 27] and"),
    ({"bias": (4, 26)}, "bias and neighbours differ in columns: [4, 26] and [?, 27]"),
    ({"bias": (3, 27)}, "bias has the shape [3, 27], for 4 heads"),
]
WRONG_WRITES = [
    ({"rows": 5, "key_new": (4, 256)}, "key_new and query differ: [4, 256] and [5, 256]"),
    ({"value_new": (-1, 128)}, "value_new and query differ: [?, 128] and [?, 256]"),
    ({"rows": 5, "write_index": (4,)}, "write_index and query differ in rows: [4] and [5, 256]"),
]


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        *((name, *wrong) for name in NAMES for wrong in WRONG),
        *(("CachedNearbyAttention", *wrong) for wrong in WRONG_WRITES),
    ],
)
def test_sizes_that_do_not_fit_are_named(harness, name, plugin, changed, says):
    harness.log()
    changed = dict(changed)
    bias = changed.pop("bias", None)
    given = tensors(name, **changed)
    if bias is not None:
        given.shapes[-1] = bias
    assert harness.configure(plugin, name, given) == -1
    assert harness.log().startswith(f"1 nuwa::{name}: {says}")
    assert harness.shape_change(plugin, name, given) == -1


def test_what_else_a_build_asks_for(harness, name, plugin):
    """No memory of its own, whatever the sizes; no metadata; as many formats as it takes."""
    harness.log()
    for rows in (1, 300):
        given = tensors(name, rows=rows)
        assert harness.configure(plugin, name, given) == 0
        assert harness.workspace(plugin, name, given) == 0
    assert harness.c.harness_format_limit(plugin) >= len(STORED)
    assert harness.c.harness_metadata(plugin) in (None, b"")
    assert harness.log() == ""


def test_a_wrong_number_of_tensors_is_named(harness, name, plugin):
    harness.log()
    given = tensors(name)
    del given.types[-2:], given.shapes[-2:]
    assert harness.configure(plugin, name, given) == -1
    assert f"{len(INPUTS[name]) - 2} inputs and {harness.outputs(name)} outputs" in harness.log()


def test_tactics(harness, name, plugin):
    found = (c_int * 2)()
    expected = [1, 2] if name == "CachedNearbyAttention" else []
    assert harness.c.harness_tactics(plugin, found) == len(expected)
    assert list(found)[: len(expected)] == expected
    for tactic in (0, *expected):
        assert harness.c.harness_set_tactic(plugin, tactic) == 0
    for tactic in (-1, 3 if expected else 1):
        assert harness.c.harness_set_tactic(plugin, tactic) == -1


def test_shapes_that_keep_changing_leave_nothing_behind(harness, name, plugin):
    """Also copies, which TensorRT makes for every context."""

    def churn(count: int) -> int:
        draw = np.random.default_rng(0)
        for _ in range(count):
            given = tensors(name, rows=int(draw.integers(1, 500)), bias=bool(draw.integers(2)))
            assert harness.shape_change(plugin, name, given) == 0
            copy = _pointer(harness.c.harness_clone(plugin))
            read = harness.c.harness_round_trip(harness.creators[name], copy)
            harness.c.harness_delete(copy)
            harness.c.harness_delete(_pointer(read))
        return psutil.Process().memory_info().rss

    before = churn(2000)
    assert churn(10_000) - before < 2**18, "26 bytes a round"
