"""What is in an exported file: operators, functions, axes; and that real sizes run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
import onnxruntime  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from nuwa.export import operators  # noqa: E402
from nuwa.export.graphs import OPSET, graphs, write_graph  # noqa: E402
from nuwa.export.parity import ExportError  # noqa: E402
from nuwa.export.verify import verify_graph  # noqa: E402
from nuwa.runtime.bundle import open_bundle  # noqa: E402
from nuwa.spec.config import VisualConfig  # noqa: E402
from nuwa.spec.grid import Extent  # noqa: E402
from nuwa.spec.manifest import (  # noqa: E402
    DECODER_STEP,
    GRAPHS,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    RANKER,
    SKETCH_TOKENIZER,
    STEP_ROW_INPUTS,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    condition_outputs,
    decoder_step_outputs,
    graph_file,
    layer_names,
)
from nuwa.training.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from nuwa.training.nuwa import NUWA  # noqa: E402
from nuwa.training.vqgan import VQGAN  # noqa: E402

LAYERS = 2
CACHES = [
    name
    for kind in ("key_cache", "value_cache", "cross_key", "cross_value")
    for name in layer_names(kind, LAYERS)
]
NAMES = {
    DECODER_STEP: (
        [*STEP_ROW_INPUTS, "ranks", "cross_columns", *CACHES],
        decoder_step_outputs(LAYERS),
    ),
    TEXT_ENCODER: (["tokens"], condition_outputs(LAYERS)),
    IMAGE_TOKENIZER: (["pixels"], ["codes"]),
    IMAGE_DETOKENIZER: (["codes"], ["pixels"]),
    VISUAL_ENCODER: (["tokens", "coordinates", "neighbours"], condition_outputs(LAYERS)),
    SKETCH_TOKENIZER: (["class_maps"], ["codes"]),
    RANKER: (["tokens", "frames"], ["score"]),
}
WIDTH, NEIGHBOURS, LENGTH, CODES = 32, 14, 77, 64
VOLUME, VISUAL_NEIGHBOURS = 48, 27


def load(bundle: Path, name: str):
    return onnx.load(bundle / graph_file(name))


def axes(value) -> list:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_opset(tiny_bundle, name):
    model = load(tiny_bundle, name)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == NAMES[name][0]
    assert [value.name for value in model.graph.output] == NAMES[name][1]
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET


@pytest.mark.parametrize("name", GRAPHS)
def test_model_without_visual_encoder_has_the_same_graphs_but_for_columns(plain_bundle, name):
    model = load(plain_bundle, name)
    onnx.checker.check_model(model, full_check=True)
    wanted = [name for name in NAMES[name][0] if name != "cross_columns"]
    assert [value.name for value in model.graph.input] == wanted
    assert [value.name for value in model.graph.output] == NAMES[name][1]
    if name == DECODER_STEP:
        found = {value.name: axes(value) for value in model.graph.input}
        assert found["cross_key_0"] == ["C", 2 * LENGTH, WIDTH]


@pytest.mark.parametrize("name", NAMES)
def test_every_input_is_used(tiny_bundle, name):
    """The exporter merges inputs whose examples are one object, and leaves some without a use."""
    model = load(tiny_bundle, name)
    used = {name for node in model.graph.node for name in node.input}
    assert {value.name for value in model.graph.input} <= used


def test_attention_stays_whole_with_its_function_beside_it(tiny_bundle):
    model = load(tiny_bundle, DECODER_STEP)
    nodes = [node for node in model.graph.node if node.domain == operators.DOMAIN]
    counts = Counter(node.op_type for node in nodes)
    assert counts == {operators.NEARBY: LAYERS, operators.CACHED: LAYERS}
    for node in nodes:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given == {"heads": 2, "plugin_namespace": b"nuwa", "plugin_version": b"1"}
    functions = {(f.domain, f.name): f for f in model.functions}
    assert set(functions) == {("nuwa", operators.NEARBY), ("nuwa", operators.CACHED)}
    for function in functions.values():
        assert {node.domain for node in function.node} == {""}
        assert "heads" in function.attribute
        defaults = {a.name: a.s for a in function.attribute_proto}
        assert defaults == {"plugin_namespace": b"nuwa", "plugin_version": b"1"}


def test_nothing_is_gathered_by_tuples(tiny_bundle):
    """GatherND in a recorded CUDA graph reads memory of the host that is gone (ONNX Runtime's CUDA
    provider before 1.31).
    """
    model = load(tiny_bundle, DECODER_STEP)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        kinds = {node.op_type for node in nodes}
        assert "Gather" in kinds and "GatherND" not in kinds


def test_axes_that_change_are_dynamic_and_only_those(tiny_bundle):
    model = load(tiny_bundle, DECODER_STEP)
    found = {value.name: axes(value) for value in (*model.graph.input, *model.graph.output)}
    assert found["tokens"] == found["guidance"] == ["T"]
    assert found["coordinates"] == ["T", 3]
    assert found["neighbours"] == ["T", NEIGHBOURS]
    assert found["cross_neighbours"] == ["T", "m"]
    assert found["ranks"] == ["W"]
    assert found["cross_columns"] == ["m"]
    entries = open_bundle(tiny_bundle).manifest.cache_entries
    assert found["key_cache_1"] == found["value_cache_0_out"] == ["S", entries, WIDTH]
    assert found["cross_key_0"] == found["cross_value_1"] == ["C", 2 * LENGTH + VOLUME, WIDTH]
    assert (found["next_tokens"], found["logits"]) == (["T"], ["T", CODES])
    for name in (TEXT_ENCODER, IMAGE_TOKENIZER, IMAGE_DETOKENIZER, SKETCH_TOKENIZER):
        graph = load(tiny_bundle, name).graph
        for value in (*graph.input, *graph.output):
            first, *others = axes(value)
            assert first == "B" and all(isinstance(size, int) for size in others)
    graph = load(tiny_bundle, VISUAL_ENCODER).graph
    found = [axes(value) for value in (*graph.input, *graph.output)]
    assert found[:3] == [["N"], ["N", 3], ["N", VISUAL_NEIGHBOURS]]
    assert found[3:] == [["N", WIDTH]] * 2 * LAYERS
    graph = load(tiny_bundle, RANKER).graph
    found = [axes(value) for value in (*graph.input, *graph.output)]
    assert found == [[LENGTH], ["F", 16, 16, 3], []]


def test_types_of_the_border(tiny_bundle):
    def kinds(values) -> dict:
        return {value.name: value.type.tensor_type.elem_type for value in values}

    graph = load(tiny_bundle, DECODER_STEP).graph
    real = {"temperature", "top_p", "uniform", "guidance"}
    for name, kind in kinds(graph.input).items():
        is_real = name in real or name[-1].isdigit()
        assert kind == (onnx.TensorProto.FLOAT if is_real else onnx.TensorProto.INT32), name
    assert kinds(graph.output)["next_tokens"] == onnx.TensorProto.INT32
    for name, given, made in (
        (IMAGE_TOKENIZER, onnx.TensorProto.UINT8, onnx.TensorProto.INT32),
        (IMAGE_DETOKENIZER, onnx.TensorProto.INT32, onnx.TensorProto.UINT8),
        (SKETCH_TOKENIZER, onnx.TensorProto.UINT8, onnx.TensorProto.INT32),
    ):
        graph = load(tiny_bundle, name).graph
        assert [*kinds(graph.input).values(), *kinds(graph.output).values()] == [given, made]
    graph = load(tiny_bundle, RANKER).graph
    integers = {"tokens": onnx.TensorProto.INT32, "frames": onnx.TensorProto.UINT8}
    assert kinds(graph.input) == integers
    assert kinds(graph.output) == {"score": onnx.TensorProto.FLOAT}


def test_pixels_are_bytes_at_the_border_only(tiny_bundle):
    """TensorRT has uint8 at the border only: the first node casts from it, the last one to it."""
    borders = ((IMAGE_TOKENIZER, "pixels"), (SKETCH_TOKENIZER, "class_maps"), (RANKER, "frames"))
    for name, given in borders:
        nodes = load(tiny_bundle, name).graph.node
        readers = {node.op_type for node in nodes if given in node.input}
        assert readers - {"Shape"} == {"Cast"}  # a shape reads no byte
    assert load(tiny_bundle, IMAGE_DETOKENIZER).graph.node[-1].op_type == "Cast"


def test_index_arithmetic_is_done_once_for_all_layers(tiny_bundle, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        tiny_bundle / graph_file(DECODER_STEP), options, providers=["CPUExecutionProvider"]
    )
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    readers = Counter(name for node in graph.node for name in node.input)
    # mask, index, "has any": once each; the writes of both caches once each.
    assert readers["neighbours"] == readers["cross_neighbours"] == 3
    assert readers["condition_slot"] == 1
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Sqrt"] == kinds["Reciprocal"] == 0  # constant sizes were folded
    assert kinds["Gelu"] == LAYERS and kinds["FusedMatMul"] == 2 * LAYERS
    assert kinds["LayerNormalization"] == 3 * LAYERS + 1


@pytest.mark.parametrize(
    ("precision", "kind", "most"),
    [("fp16", onnx.TensorProto.FLOAT16, 5e-3), ("bf16", onnx.TensorProto.BFLOAT16, 2e-2)],
)
def test_halves_are_stored_and_fp32_decides(tiny_checkpoint, tmp_path, precision, kind, most):
    checkpoint = load_checkpoint(tiny_checkpoint)
    graph = next(g for g in graphs(checkpoint, precision) if g.name == DECODER_STEP)
    path = tmp_path / "step.onnx"
    write_graph(graph, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)
    }
    assert kinds["key_cache_0"] == kinds["cross_value_1"] == kind
    assert kinds["logits"] == kinds["uniform"] == onnx.TensorProto.FLOAT
    large = [w for w in model.graph.initializer if np.prod(w.dims) > 100]
    assert large and {w.data_type for w in large} == {kind}
    figures = verify_graph(checkpoint, path, DECODER_STEP, precision)
    assert 0 < figures["logits_relative"] < most
    assert figures["draw_error"] < 1e-6
    head = next(w for w in model.graph.initializer if w.name.endswith("head.weight"))
    whole = numpy_helper.to_array(head)
    halved = (0.5 * whole.astype(np.float32)).astype(whole.dtype)
    head.CopyFrom(numpy_helper.from_array(halved, head.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=f"the limit for {precision}"):
        verify_graph(checkpoint, path, DECODER_STEP, precision)


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_tells_of_the_sources_that_a_graph_comes_from(tiny_bundle, name):
    """Their folder and lines, by which equal models would have graphs of different hashes."""
    data = (tiny_bundle / graph_file(name)).read_bytes()
    assert str(Path(torch.__file__).parents[1]).encode() not in data
    assert str(Path(operators.__file__).parents[1]).encode() not in data and b".py" not in data


def test_weights_beyond_the_limit_go_to_a_second_file(tiny_checkpoint, tmp_path):
    checkpoint = load_checkpoint(tiny_checkpoint)
    graph = next(g for g in graphs(checkpoint, "fp32") if g.name == TEXT_ENCODER)
    whole, split = tmp_path / "whole.onnx", tmp_path / "split.onnx"
    write_graph(graph, whole)
    write_graph(graph, split, inline_limit=1000)
    assert not whole.with_name("whole.onnx.data").exists()
    data = split.with_name("split.onnx.data").stat().st_size
    assert split.stat().st_size < whole.stat().st_size - data / 2
    figures = verify_graph(checkpoint, split, TEXT_ENCODER, "fp32")
    assert figures == verify_graph(checkpoint, whole, TEXT_ENCODER, "fp32")


@pytest.mark.slow
def test_other_kinds_of_model_export_and_agree(tiny_checkpoint, tmp_path):
    """Two windows, no relative bias, raster shift, unmasked padding, attention in the VQ-GAN.

    The visual encoder sees known tokens only (there are no sketches), through other windows.
    """
    tiny = load_checkpoint(tiny_checkpoint)
    config = dataclasses.replace(
        tiny.config,
        image=dataclasses.replace(tiny.config.image, attention_resolutions=(4, 8), res_blocks=2),
        text=dataclasses.replace(tiny.config.text, mask_padding=False),
        decoder=dataclasses.replace(
            tiny.config.decoder,
            layers=3,
            heads=4,
            extents=(Extent(1, 3, 3), Extent(3, 1, None)),
            shift="raster",
            relative_bias=False,
        ),
        sketch=None,
        visual=VisualConfig(layers=2, heads=2, extent=Extent(None, 3, 1), cross=Extent(1, 3, 5)),
    )
    torch.manual_seed(0)
    checkpoint = Checkpoint(
        config, VQGAN(config.image).eval(), NUWA(config).eval(), tiny.text_tokenizer, {}
    )
    assert [graph.name for graph in graphs(checkpoint, "fp32")] == [*GRAPHS, VISUAL_ENCODER]
    for graph in graphs(checkpoint, "fp32"):
        path = tmp_path / graph_file(graph.name)
        write_graph(graph, path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        verify_graph(checkpoint, path, graph.name, "fp32")
    step = onnx.load(tmp_path / graph_file(DECODER_STEP))
    assert all("bias" not in function.input for function in step.functions)
