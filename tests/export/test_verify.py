"""A graph that disagrees with PyTorch is refused, whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
from onnx import numpy_helper  # noqa: E402

from nuwa.export import graphs, operators  # noqa: E402
from nuwa.export.parity import LIMITS, ExportError, Figures  # noqa: E402
from nuwa.export.verify import verify_graph  # noqa: E402
from nuwa.spec.manifest import (  # noqa: E402
    DECODER_STEP,
    GRAPHS,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    RANKER,
    SKETCH_TOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    graph_file,
)
from nuwa.training.checkpoint import load_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture
def tamper(checkpoint, tiny_bundle, tmp_path):
    """Verifies a graph of the tiny bundle after `change` was done to it."""

    def run(name: str, change: Callable) -> dict:
        model = onnx.load(tiny_bundle / graph_file(name))
        change(model)
        path = tmp_path / graph_file(name)
        onnx.save(model, path)
        return verify_graph(checkpoint, path, name, "fp32")

    return run


def scale_weight(words: str, factor: float) -> Callable:
    """Multiplies the first weight whose name holds all the words."""

    def change(model) -> None:
        for weight in model.graph.initializer:
            if all(word in weight.name for word in words.split()):
                scaled = numpy_helper.to_array(weight) * np.float32(factor)
                weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
                return
        raise AssertionError(f"no weight has {words!r} in its name")

    return change


def edit_function(name: str, old: str, new: str) -> Callable:
    """Replaces a function's body by one in which `old` reads `new`."""

    def change(model) -> None:
        index = next(i for i, f in enumerate(model.functions) if f.name == name)
        text = onnx.printer.to_text(model.functions[index])
        assert old in text
        model.functions[index].CopyFrom(onnx.parser.parse_function(text.replace(old, new)))

    return change


@pytest.mark.parametrize("name", [*GRAPHS, VISUAL_ENCODER, SKETCH_TOKENIZER, RANKER])
def test_untouched_graphs_agree(tamper, name):
    figures = tamper(name, lambda model: None)
    relative = [value for figure, value in figures.items() if figure.endswith("_relative")]
    assert all(value < LIMITS["fp32"]["relative"] / 10 for value in relative)
    mismatches = [v for figure, v in figures.items() if figure.endswith("_mismatches")]
    assert sum(mismatches) == 0
    if name == DECODER_STEP:
        assert figures["overwritten_entries"] == 0 and figures["token_mismatches_of"] > 200
    if name == RANKER:
        assert figures["score_error"] < LIMITS["fp32"]["score_error"] / 10


@pytest.mark.parametrize(
    ("name", "words", "factor"),
    [
        (DECODER_STEP, "blocks.1 self_qkv", 1.01),
        (DECODER_STEP, "blocks.0 ff_out weight", 1.01),
        (DECODER_STEP, "blocks.1 cross_out bias", 1.5),
        (DECODER_STEP, "blocks.0 bias", 1.05),
        (DECODER_STEP, "embedding positions", 1.05),
        (DECODER_STEP, "head weight", float("nan")),
        (DECODER_STEP, "blocks.1 cross_bias", 1.05),
        (TEXT_ENCODER, "text embedding", 1.1),
        (VISUAL_ENCODER, "visual embedding ids", 1.01),
        (VISUAL_ENCODER, "visual embedding positions", 1.05),
        (VISUAL_ENCODER, "visual blocks.0 bias", 1.05),
        (VISUAL_ENCODER, "visual blocks.0 ff_out weight", 1.01),
        (SKETCH_TOKENIZER, "quant_conv weight", 1.2),
        (SKETCH_TOKENIZER, "encoder conv_in weight", 0.5),
        (RANKER, "clip project weight", 1.1),
        (RANKER, "text embedding", 1.1),
        (RANKER, "frames locate weight", float("nan")),
        (IMAGE_TOKENIZER, "conv_out", 0.8),
        (IMAGE_TOKENIZER, "quant_conv weight", 1.2),
        (IMAGE_DETOKENIZER, "conv_out weight", 1.1),
        (IMAGE_DETOKENIZER, "conv_out weight", float("nan")),
    ],
)
def test_changed_weight_is_refused(tamper, name, words, factor):
    with pytest.raises(ExportError, match=f"{name}.onnx disagrees with PyTorch: .* the limit"):
        tamper(name, scale_weight(words, factor))


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        # Masked neighbours count; empty rows give a mean; a row that skips its write does not.
        (operators.CACHED, "Where (masked_Tn, never, zero_f)", "Where (masked_Tn, zero_f, zero_f)"),
        (operators.NEARBY, "Where (empty_T1, zero_f, one_f)", "Where (empty_T1, one_f, one_f)"),
        (operators.CACHED, "Where (skips_T, writer_slot_1, slot)", "Max (slot, no_entry)"),
        (operators.CACHED, "Where (skips_T, spare_row_1, own_T)", "Max (own_T, row_0)"),
        # All reads come from slot 0.
        (operators.CACHED, "base_T = Mul (slot, stride)", "base_T = Mul (slot, zero)"),
    ],
)
def test_changed_operator_is_refused(tamper, function, old, new):
    with pytest.raises(ExportError, match=DECODER_STEP):
        tamper(DECODER_STEP, edit_function(function, old, new))


@pytest.fixture(scope="module", params=["int8", "fp8"])
def quantized_step(checkpoint, tmp_path_factory, request):
    """(decoder_step of the checkpoint in a precision, the precision)."""
    path = tmp_path_factory.mktemp(request.param) / graph_file(DECODER_STEP)
    (step, *_) = graphs.graphs(checkpoint, request.param)
    graphs.write_graph(step, path)
    return path, request.param


def test_quantized_is_near_and_is_the_same_in_pytorch(checkpoint, quantized_step):
    path, precision = quantized_step
    figures = verify_graph(checkpoint, path, DECODER_STEP, precision)
    most = {"int8": 0.2, "fp8": 0.5}[precision]
    assert figures["quantized_error"] < 1e-5 < figures["logits_relative"] < most
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    bytes_ = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[precision]
    stored = [weight for weight in model.graph.initializer if weight.data_type == bytes_]
    assert len(stored) == 6 * checkpoint.config.decoder.layers + 1
    if precision == "int8":
        with pytest.raises(ExportError, match="logits_relative .* for fp32"):
            verify_graph(checkpoint, path, DECODER_STEP, "fp32")


@pytest.mark.parametrize("words", ["head scale", "blocks.0 ff_out scale"])
def test_one_wrong_scale_is_refused(checkpoint, quantized_step, tmp_path, words):
    """A change that is lost in what the bytes cost anyway, but not beside them in PyTorch."""
    step, precision = quantized_step
    model = onnx.load(step)
    for weight in model.graph.initializer:
        if all(word in weight.name for word in words.split()):
            scales = numpy_helper.to_array(weight).copy()
            scales[-1] = (scales[-1].astype(np.float32) * 1.05).astype(scales.dtype)
            weight.CopyFrom(numpy_helper.from_array(scales, weight.name))
    path = tmp_path / step.name
    onnx.save(model, path)
    with pytest.raises(ExportError, match="quantized_error"):
        verify_graph(checkpoint, path, DECODER_STEP, precision)


def test_columns_taken_for_others_are_refused(tamper):
    """As if the bias of one visual column were another's."""

    def shift_columns(model) -> None:
        for node in model.graph.node:
            node.input[:] = ["shifted" if name == "cross_columns" else name for name in node.input]
        one = onnx.helper.make_tensor("one", onnx.TensorProto.INT32, [], [1])
        none = onnx.helper.make_tensor("none", onnx.TensorProto.INT32, [], [0])
        model.graph.initializer.extend([one, none])
        before = onnx.helper.make_node("Sub", ["cross_columns", "one"], ["before"])
        model.graph.node.insert(0, onnx.helper.make_node("Max", ["before", "none"], ["shifted"]))
        model.graph.node.insert(0, before)

    with pytest.raises(ExportError, match="logits_relative"):
        tamper(DECODER_STEP, shift_columns)


def test_changed_sampler_is_refused(tamper):
    def draw_from_another_number(model) -> None:
        for node in model.graph.node:
            node.input[:] = ["top_p" if name == "uniform" else name for name in node.input]

    with pytest.raises(ExportError, match="draw_error"):
        tamper(DECODER_STEP, draw_from_another_number)


def test_what_is_not_finite_agrees_with_nothing():
    odd = np.array([1.0, np.nan, 1.0])
    for got, wanted in ((np.ones(3), odd), (odd, np.ones(3)), (odd, odd)):
        figures = Figures()
        figures.differ("x", got, wanted)
        with pytest.raises(ExportError, match="x_relative is inf"):
            figures.check("graph", "fp32")
    figures = Figures()
    figures.exceed("draw_error", float("nan"))
    with pytest.raises(ExportError, match="draw_error is inf"):
        figures.check("graph", "fp32")


def test_figures_are_counted_by_hand(monkeypatch):
    monkeypatch.setitem(LIMITS, "loose", {"relative": 1.0})
    figures = Figures()
    figures.differ("x", np.array([1.0, 2.0, -4.0]), np.array([1.0, 2.5, -4.0]))
    figures.differ("x", np.zeros((0, 3)), np.zeros((0, 3)))
    figures.mismatch("some", np.array([1, 2, 3]), np.array([1, 2, 4]))
    figures.mismatch("some", np.array([1]), np.array([1]))
    wanted = {"x_absolute": 0.5, "x_relative": 0.125, "some": 1, "some_of": 4}
    assert figures.check("graph", "loose") == wanted
    with pytest.raises(ExportError, match=r"graph\.onnx .* x_relative is 0\.125, the limit .*fp32"):
        figures.check("graph", "fp32")
