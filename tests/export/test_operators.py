"""The ONNX functions and the PyTorch operators against the loops of spec/reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
import onnx_ir as ir  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from nuwa.export import operators  # noqa: E402
from nuwa.spec import reference  # noqa: E402
from nuwa.training import nearby  # noqa: E402, F401  defines torch.ops.nuwa

TOLERANCE = {np.float32: 1e-6, np.float16: 2e-3}
OPSETS = (18, 20, 23)


@dataclass(frozen=True)
class Case:
    """T positions, S slots, R entries, n neighbours; masked, writing: shares of rows' entries."""

    T: int = 7
    S: int = 2
    R: int = 11
    n: int = 5
    heads: int = 2
    size: int = 4
    masked: float = 0.3
    writing: float = 0.7
    bias: bool = True

    def arrays(self, dtype) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(abs(hash(self)) % 2**32)
        width = self.heads * self.size

        def real(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        place = rng.permutation(self.S * self.R)[: self.T]
        writes = (rng.random(self.T) < self.writing) & (np.arange(self.T) < len(place))
        place = np.pad(place, (0, self.T - len(place)))
        near = rng.integers(0, self.R, (self.T, self.n))
        arrays = {
            "query": real(self.T, width),
            "key_new": real(self.T, width),
            "value_new": real(self.T, width),
            "key_cache": real(self.S, self.R, width),
            "value_cache": real(self.S, self.R, width),
            "slot": (place // self.R).astype(np.int32),
            "write_index": np.where(writes, place % self.R, -1).astype(np.int32),
            "neighbours": np.where(rng.random(near.shape) < self.masked, -1, near).astype(np.int32),
        }
        return arrays | ({"bias": real(self.heads, self.n)} if self.bias else {})


CASES = {
    "usual": Case(),
    "no bias": Case(bias=False),
    "one position": Case(T=1, S=1),
    "one position that writes": Case(T=1, S=1, writing=1.0),
    "one position that does not": Case(T=1, S=1, writing=0.0),
    "one neighbour": Case(n=1, masked=0.5),
    "one head": Case(heads=1, size=8),
    "four heads of three": Case(heads=4, size=3),
    "head of one": Case(heads=3, size=1),
    "all masked": Case(masked=1.0),
    "all masked, no bias": Case(masked=1.0, bias=False),
    "none masked": Case(masked=0.0),
    "nobody writes": Case(writing=0.0),
    "all write": Case(writing=1.0),
    "one slot": Case(T=9, S=1, R=10),
    "more slots than positions": Case(T=3, S=8, R=2),
    "one entry a slot": Case(T=4, S=4, R=1, n=3),
    "every entry written": Case(T=6, S=2, R=3, writing=1.0),
    "more positions than entries": Case(T=5, S=1, R=3, writing=1.0),
    "wide": Case(T=20, S=3, R=40, n=23, heads=4, size=16),
}
NEARBY_NAMES = {"key_cache": "key", "value_cache": "value"}
parametrize_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
parametrize_types = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: t.__name__)


def nearby_arrays(arrays: dict) -> dict:
    """The inputs of NearbyAttention among those of CachedNearbyAttention."""
    only_cached = ("key_new", "value_new", "write_index")
    return {NEARBY_NAMES.get(k, k): v for k, v in arrays.items() if k not in only_cached}


def expected(arrays: dict, heads: int) -> dict[str, tuple[np.ndarray, ...]]:
    """What the reference gives, by operator."""
    return {
        operators.NEARBY: (reference.nearby_attention(**nearby_arrays(arrays), heads=heads),),
        operators.CACHED: reference.cached_nearby_attention(**arrays, heads=heads),
    }


def one_call(name: str, arrays: dict, heads: int, sizes=None, opset: int = 20):
    """A model of one call, every axis dynamic unless `sizes` is "static"; functions attached."""
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": 6}
    axes = {"query": "T", "slot": "T", "write_index": "T", "key_new": "T", "value_new": "T"}

    def info(formal: str, array: np.ndarray):
        shape: list = list(array.shape) if sizes == "static" else [None] * array.ndim
        shape[0] = axes.get(formal, formal)
        if formal == "bias":
            shape = list(array.shape)
        return helper.make_tensor_value_info(formal, kinds[array.dtype.name], shape)

    outputs = ["out"] if name == operators.NEARBY else ["out", "key_cache_out", "value_cache_out"]
    node = helper.make_node(
        name, list(arrays), outputs, domain="nuwa", heads=heads, **operators.PLUGIN_ATTRIBUTES
    )
    real = kinds[arrays["query"].dtype.name]
    results = [
        helper.make_tensor_value_info(o, real, [None] * (2 if o == "out" else 3)) for o in outputs
    ]
    graph = helper.make_graph([node], "one_call", [info(*pair) for pair in arrays.items()], results)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = ir.serde.deserialize_model(proto)
    operators.attach(model)
    return ir.serde.serialize_model(model)


def run_onnx(proto, arrays: dict) -> list[np.ndarray]:
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, arrays)


def assert_same(got, wanted, dtype) -> None:
    """Attention within the tolerance, caches exactly."""
    scale = max(1.0, float(np.abs(wanted[0]).max()))
    assert got[0].dtype == dtype
    np.testing.assert_allclose(
        got[0].astype(np.float64), wanted[0], rtol=0, atol=TOLERANCE[dtype] * scale
    )
    for cache, wanted_cache in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(cache, wanted_cache)


@parametrize_cases
@parametrize_types
@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_onnx_functions_are_the_reference(case: Case, dtype, sizes) -> None:
    arrays = case.arrays(dtype)
    for name, wanted in expected(arrays, case.heads).items():
        inputs = arrays if name == operators.CACHED else nearby_arrays(arrays)
        got = run_onnx(one_call(name, inputs, case.heads, sizes), inputs)
        assert_same(got, wanted, dtype)


@parametrize_cases
@parametrize_types
def test_torch_operators_are_the_reference(case: Case, dtype) -> None:
    arrays = case.arrays(dtype)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors.setdefault("bias", None)
    wanted = expected(arrays, case.heads)
    out = torch.ops.nuwa.nearby_attention(**nearby_arrays(tensors), heads=case.heads)
    assert_same([out.numpy()], wanted[operators.NEARBY], dtype)
    outs = torch.ops.nuwa.cached_nearby_attention(**tensors, heads=case.heads)
    assert_same([tensor.numpy() for tensor in outs], wanted[operators.CACHED], dtype)


@pytest.mark.parametrize("opset", OPSETS)
def test_bodies_hold_in_every_opset_tried(opset: int) -> None:
    case = CASES["usual"]
    arrays = case.arrays(np.float32)
    proto = one_call(operators.CACHED, arrays, case.heads, opset=opset)
    wanted = expected(arrays, case.heads)[operators.CACHED]
    assert_same(run_onnx(proto, arrays), wanted, np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_generic_body_takes_calls_with_and_without_bias(bias: bool) -> None:
    case = Case(bias=bias)
    arrays = nearby_arrays(case.arrays(np.float32))
    proto = one_call(operators.NEARBY, arrays, case.heads)
    del proto.functions[:]
    proto.functions.append(operators.function(operators.NEARBY, 20))
    wanted = reference.nearby_attention(**arrays, heads=case.heads)
    assert_same(run_onnx(proto, arrays), [wanted], np.float32)


def test_masked_entries_do_not_matter() -> None:
    case = Case(masked=0.5, writing=0.0)
    arrays = case.arrays(np.float32)
    proto = one_call(operators.CACHED, arrays, case.heads)
    before = run_onnx(proto, arrays)[0]
    read = np.zeros((case.S, case.R), bool)
    for slot, row in zip(arrays["slot"], arrays["neighbours"], strict=True):
        read[slot, row[row >= 0]] = True
    assert not read.all()
    for name in ("key_cache", "value_cache"):
        arrays[name] = np.where(read[..., None], arrays[name], np.float32(1e4))
    np.testing.assert_array_equal(run_onnx(proto, arrays)[0], before)


def test_position_reads_what_another_of_the_same_call_writes() -> None:
    arrays = Case(T=2, S=1, R=4, n=1, bias=False).arrays(np.float32)
    arrays["write_index"] = np.array([3, 0], np.int32)
    arrays["neighbours"] = np.array([[0], [3]], np.int32)
    got = run_onnx(one_call(operators.CACHED, arrays, 2), arrays)[0]
    np.testing.assert_allclose(got, arrays["value_new"][::-1], rtol=1e-6)


def test_write_is_in_place_with_one_buffer_for_input_and_output() -> None:
    case = CASES["wide"]
    arrays = case.arrays(np.float32)
    proto = one_call(operators.CACHED, arrays, case.heads, "static")
    wanted = expected(arrays, case.heads)[operators.CACHED]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    for name in ("key_cache", "value_cache"):
        binding.bind_ortvalue_output(f"{name}_out", values[name])
    session.run_with_iobinding(binding)
    got = [binding.get_outputs()[0].numpy(), *(values[n].numpy() for n in NEARBY_NAMES)]
    assert_same(got, wanted, np.float32)


def test_sizes_that_calls_share_become_constants() -> None:
    case = CASES["usual"]
    arrays = case.arrays(np.float32)
    static = one_call(operators.CACHED, arrays, case.heads, "static").functions[0]
    dynamic = one_call(operators.CACHED, arrays, case.heads).functions[0]
    shapes = [[node for node in f.node if node.op_type == "Shape"] for f in (static, dynamic)]
    assert len(shapes[0]) == 1 < len(shapes[1])  # the one left counts the rows, a dynamic axis


def test_function_without_bias_has_no_such_input() -> None:
    """TensorRT's parser takes a function only if a call gives all its inputs."""
    arrays = nearby_arrays(Case(bias=False).arrays(np.float32))
    proto = one_call(operators.NEARBY, arrays, 2)
    assert list(proto.functions[0].input) == ["query", "key", "value", "slot", "neighbours"]


def test_schemas_name_the_inputs_of_the_functions() -> None:
    for name, schema in operators.schemas().items():
        formals = [formal.name for formal in schema.inputs]
        assert formals == list(operators.function(name, 20).input)
        assert set(schema.attributes) == {"heads", *operators.PLUGIN_ATTRIBUTES}


def test_nothing_on_the_device_waits_for_a_number_of_rows() -> None:
    """Shapes are on the host: CUDA graphs need what is computed there to stay there."""
    sizes = operators.Sizes(head_dim=4, entries=11, bias=True)
    for name in (operators.CACHED, operators.NEARBY):
        hosts, numbers = set(), {"Add", "Squeeze", "Range"}
        for node in operators.function(name, 20, sizes).node:
            given = hosts & {*node.input}
            assert not given or node.op_type in numbers, (name, node.op_type, given)
            if node.op_type == "Shape" or (given and node.op_type != "Range"):
                hosts.update(node.output)
        assert (name == operators.CACHED) == bool(hosts)


@pytest.mark.parametrize("sizes", [operators.Sizes(), operators.Sizes(4, 11, bias=True)])
def test_nothing_is_gathered_by_tuples(sizes) -> None:
    """ONNX Runtime's CUDA provider before 1.31 cannot record a GatherND."""
    for name in (operators.CACHED, operators.NEARBY):
        kinds = {node.op_type for node in operators.function(name, 20, sizes).node}
        assert "Gather" in kinds and "GatherND" not in kinds


def test_whole_numbers_are_not_compared_by_argmax() -> None:
    """ONNX Runtime's CUDA provider has none for them."""
    kinds = {}
    for node in operators.function(operators.CACHED, 20).node:
        kinds |= {out: node.attribute[0].i for out in node.output if node.op_type == "Cast"}
        if node.op_type == "Unsqueeze":
            kinds[node.output[0]] = kinds.get(node.input[0])
        if node.op_type == "ArgMax":
            assert kinds[node.input[0]] == TensorProto.FLOAT
            return
    raise AssertionError("it looks for the first row that writes")
