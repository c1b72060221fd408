"""The custom operators in ONNX Runtime, on its CPU provider: names, types, in place, no bias.

What they compute there is attention_cpu.cc; on a GPU the same source calls the kernels.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

onnx = pytest.importorskip("onnx")

from nuwa.export.operators import CACHED, NEARBY, function, schemas  # noqa: E402

from .calls import Sizes, drawn, stored  # noqa: E402
from .native_attention import FOLDER, NativeAttention  # noqa: E402
from .needs import compiler  # noqa: E402
from .plugin_harness import built, visible  # noqa: E402

TYPES = {
    "fp32": (onnx.TensorProto.FLOAT, np.float32),
    "fp16": (onnx.TensorProto.FLOAT16, np.float16),
}
NAMES = {  # of inputs, as tests/plugins_trt/test_attention.py calls them
    NEARBY: ("query", "key", "value", "slot", "neighbours"),
    CACHED: (
        *("query", "key_new", "value_new", "key", "value"),
        *("slot", "write_index", "neighbours"),
    ),
}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return NativeAttention(tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def root():
    """Where the headers of ONNX Runtime are."""
    folder = Path(os.environ.get("ONNXRUNTIME_ROOT", FOLDER.parent / "build" / "onnxruntime"))
    if not (folder / "include" / "onnxruntime_cxx_api.h").exists():
        pytest.skip("no headers of ONNX Runtime (ONNXRUNTIME_ROOT)")
    return folder


@pytest.fixture(scope="module")
def library(root, tmp_path_factory):
    """The operators for the CPU provider."""
    path = tmp_path_factory.mktemp("operators") / "libnuwa_operators_cpu.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-DNUWA_ON_CPU"]
    flags += ["-shared", "-fPIC", "-fvisibility=hidden", "-isystem", root / "include"]
    sources = [FOLDER / "ort_operators.cc", FOLDER / "attention_cpu.cc"]
    subprocess.run([compiler(), *flags, "-o", path, *sources], check=True, timeout=300)
    return path


def model(name: str, storage: str, sizes: Sizes, *, body: bool) -> bytes:
    """A graph of one node; without a body it needs the library."""
    kind = TYPES[storage][0]
    indices = ("slot", "write_index", "neighbours")
    names = [*NAMES[name], *(["bias"] if sizes.bias else [])]
    make = onnx.helper.make_tensor_value_info
    inputs = [
        make(each, onnx.TensorProto.INT32 if each in indices else kind, None) for each in names
    ]
    outputs = ["out"] if name == NEARBY else ["out", "key_out", "value_out"]
    node = onnx.helper.make_node(name, names, outputs, domain="nuwa", heads=sizes.heads)
    graph = onnx.helper.make_graph(
        [node], "one", inputs, [make(each, kind, None) for each in outputs]
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nuwa", 1)]
    functions = [function(name, 20)] if body else []
    proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return proto.SerializeToString()


def session(library: Path | None, data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feeds(kept: dict[str, np.ndarray], storage: str) -> dict[str, np.ndarray]:
    kind = TYPES[storage][1]
    return {n: a if a.dtype == np.int32 else a.view(kind) for n, a in kept.items()}


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("name", [NEARBY, CACHED])
def test_the_library_computes_it_whether_or_not_there_is_a_body(
    native, library, name, storage, bias, body
):
    sizes = Sizes(9, 2, 40, 27, 3, 64, bias=bias)
    kept, _ = stored(native, drawn(sizes, writes=name == CACHED), storage)
    given = feeds({each: array.copy() for each, array in kept.items()}, storage)
    made = session(library, model(name, storage, sizes, body=body)).run(None, given)
    wanted = native(storage, heads=sizes.heads, **kept)
    assert made[0].tobytes() == wanted.tobytes(), "not the function body, nor another order"
    for output, cache in zip(made[1:], ("key", "value"), strict=name == CACHED):
        assert output.tobytes() == kept[cache].tobytes()


@pytest.mark.parametrize("storage", TYPES)
def test_caches_are_written_where_they_are(native, library, storage):
    sizes = Sizes(9, 2, 40, 27, 3, 32)
    kept, _ = stored(native, drawn(sizes), storage)
    given = feeds({each: array.copy() for each, array in kept.items()}, storage)
    made = session(library, model(CACHED, storage, sizes, body=False))
    binding = made.io_binding()
    for name, array in given.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name in ("key", "value"):
            binding.bind_ortvalue_output(f"{name}_out", value)
    binding.bind_output("out", "cpu")
    made.run_with_iobinding(binding)
    wanted = native(storage, heads=sizes.heads, **kept)
    *_, out = binding.get_outputs()  # in the order in which they were bound
    assert out.numpy().tobytes() == wanted.tobytes()
    for cache in ("key", "value"):
        assert given[cache].tobytes() == kept[cache].tobytes()


def test_heads_that_there_is_no_kernel_for_are_told(native, library):
    sizes = Sizes(2, 1, 4, 3, 2, 48)
    kept, _ = stored(native, drawn(sizes, writes=False), "fp32")
    made = session(library, model(NEARBY, "fp32", sizes, body=True))
    with pytest.raises(Exception, match="head_dim is not 32, 64 or 128"):
        made.run(None, kept)


def test_every_type_of_the_operators_is_served(native, library):
    """A type that is not would be refused, body or no body."""
    sizes = Sizes(2, 1, 4, 3, 2, 32)
    (types,) = {tuple(c.allowed_type_strs) for s in schemas().values() for c in s.type_constraints}
    assert set(types) == {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    for name in (NEARBY, CACHED):
        proto = onnx.load_from_string(model(name, "fp32", sizes, body=True))
        for value in (*proto.graph.input, *proto.graph.output):
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
                value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
        assert session(library, proto.SerializeToString()).get_inputs()


def test_the_operators_for_cuda_are_built(root):
    library = built("nuwa_operators", "90", ONNXRUNTIME_ROOT=root)
    assert visible(library) == {"RegisterCustomOps", "nuwa_unusable"}
