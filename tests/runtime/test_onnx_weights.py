"""The runtime's reader of ONNX weights against the onnx package's."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nuwa.runtime.onnx_weights import read_weights
from nuwa.spec.manifest import BundleError


def test_weights_of_a_bundle_are_those_that_onnx_reads(tiny_bundle):
    path = tiny_bundle / "decoder_step.onnx"
    found = read_weights(path)
    model = onnx.load(path)
    graph, metadata = model.graph, {each.key: each.value for each in model.metadata_props}
    aliases = json.loads(metadata["nuwa.aliases"])
    expected = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    floats = {name for name, array in expected.items() if array.dtype == np.float32 and array.size}
    assert len(floats) > 30 and floats <= set(found)
    assert "nuwa.blocks.0.cross_norm.weight" in aliases  # ones, as those of self_norm
    for name, array in found.items():
        name = aliases.get(name, name)
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
        assert (array == expected[name]).all()


def test_weights_in_a_second_file_are_mapped(tmp_path):
    weights = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.float16([[1, 2]])}
    graph = onnx.helper.make_graph(
        [], "g", [], [], [numpy_helper.from_array(array, name) for name, array in weights.items()]
    )
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx.helper.make_model(graph),
        path,
        save_as_external_data=True,
        location="m.onnx.data",
        size_threshold=0,
    )
    found = read_weights(path)
    assert isinstance(found["a"], np.memmap)
    for name, array in weights.items():
        assert found[name].dtype == array.dtype and (found[name] == array).all()


@pytest.mark.parametrize("damage", ["cut", "text", "missing"])
def test_a_damaged_file_is_named(tiny_bundle, tmp_path, damage):
    path = tmp_path / "decoder_step.onnx"
    data = (tiny_bundle / "decoder_step.onnx").read_bytes()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no model at all")
    with pytest.raises(BundleError, match=r"weights of .*decoder_step.onnx cannot be read"):
        read_weights(path)
