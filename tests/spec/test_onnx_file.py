"""Graphs of bf16 widened, against the onnx package and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nuwa.spec.onnx_file import external, read_model, widen, widened

BITS = np.resize(np.array([0x3F80, 0xBF81, 0x0001, 0x7F80, 0x8000], np.uint16), 100)


def small(as_numbers: bool, second_file) -> onnx.ModelProto:
    """Twice cast(x) * weight, backwards, in part through a function of bf16 with a constant."""
    weight = helper.make_tensor("weight", TensorProto.BFLOAT16, [100], BITS.tobytes(), raw=True)
    if as_numbers:  # kept as int32s, as helpers of the onnx package like to
        weight = TensorProto(name="weight", data_type=TensorProto.BFLOAT16, dims=[100])
        weight.int32_data.extend(BITS.tolist())
    one = helper.make_tensor("", TensorProto.BFLOAT16, [], b"\x80\x3f", raw=True)
    twice = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["one"], value=one),
            helper.make_node("Add", ["one", "one"], ["two"]),
            helper.make_node("Mul", ["a", "two"], ["b"]),
        ],
        [helper.make_opsetid("", 20)],
    )
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["line"]),
        helper.make_node("Cast", ["line"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["narrow", "weight"], ["product"]),
        helper.make_node("Twice", ["product"], ["doubled"], domain="own"),
        helper.make_node("Gather", ["doubled", "order"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [100])],
        [
            weight,
            numpy_helper.from_array(np.arange(100)[::-1].copy(), "order"),
            numpy_helper.from_array(np.array([-1]), "shape"),
        ],
        value_info=[helper.make_tensor_value_info("product", TensorProto.BFLOAT16, [100])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=10)
    model.metadata_props.add(key="kept", value="as it is")
    if second_file is not None:
        onnx.save(
            model, second_file, save_as_external_data=True, location="d.bin", size_threshold=0
        )
        return onnx.load(second_file, load_external_data=False)
    return model


@pytest.mark.parametrize("stored", ["bytes", "numbers", "second file"])
@pytest.mark.parametrize("limit", [1 << 30, 10], ids=["inline", "to a second file"])
def test_a_widened_graph_runs_and_has_the_same_values(tmp_path, stored, limit):
    path, out = tmp_path / "m.onnx", tmp_path / "wide" / "m.onnx"
    out.parent.mkdir()
    if stored == "second file":
        small(False, path)
    else:
        onnx.save(small(stored == "numbers", None), path)
    widen(path, out, limit)
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert (out.parent / "m.onnx.data").exists() == (limit == 10)
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    np.testing.assert_array_equal(values["weight"], widened(BITS))
    assert (values["order"] == np.arange(100)[::-1]).all()
    assert model.metadata_props[0].value == "as it is"
    x = np.resize([1.0, 1.5, 2.0], (10, 10))
    (y,) = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_array_equal(y, (2 * x.astype(np.float32).reshape(-1) * widened(BITS))[::-1])


def test_widening_is_exact():
    every = np.arange(1 << 16).astype(np.uint16)
    wide = widened(every)
    assert (
        wide.dtype == np.float32 and (wide.view(np.uint32) == every.astype(np.uint32) << 16).all()
    )


def test_where_weights_lie(tmp_path):
    path = tmp_path / "m.onnx"
    small(False, path)
    places = [external(each, tmp_path) for each in read_model(path).graph.initializer]
    assert places[0] == (tmp_path / "d.bin", 0, 200) and places[1][2] == 800
