"""A checkpoint's modules as ONNX graphs: names, dynamic axes, and the `nuwa` operators kept whole.

Each graph is a module with a tensors-only signature, exported by torch.onnx. Attention is
translated to one opaque node, whose function body (operators.py) is attached afterwards: the
exporter would inline it. Says nothing about whether the numbers are right; verify.py does.

Legend: T positions of a call, S slots, C condition slots, n neighbour columns, m cross columns,
W candidates to sort, B batch, M text length, d decoder width, N positions of visual volumes,
F frames.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from nuwa.spec.conditions import ConditionLayout, visual_columns, visual_neighbours
from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    RANKER,
    RANKER_INPUTS,
    SKETCH_TOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    VISUAL_ENCODER_INPUTS,
    WEIGHT_ALIASES,
    WEIGHT_TRANSPOSES,
    condition_outputs,
    decoder_step_inputs,
    decoder_step_outputs,
)
from nuwa.spec.onnx_file import INLINE_LIMIT
from nuwa.spec.plan import cache_entries
from nuwa.training import nearby  # noqa: F401  defines torch.ops.nuwa
from nuwa.training.checkpoint import Checkpoint
from nuwa.training.decode import DecoderStep, TextConditions, VisualConditions
from nuwa.training.nuwa import NUWA
from nuwa.training.ranker import Ranker
from nuwa.training.vqgan import VQGAN, to_signed

from . import operators
from .fold import FoldedNUWA, fold
from .quantize import QUANTIZED
from .translate import translations

OPSET = 20
DTYPES = {  # of activations
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "int8": torch.float32,
}
_CACHE_LISTS = 4  # key and value caches, cross keys and values: DecoderStep's last inputs


class TextOnlyStep(nn.Module):
    """`DecoderStep` of a model without a visual encoder: the same inputs but for cross_columns."""

    def __init__(self, step: DecoderStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        # An absent input is no None of the example: the exporter would mix up the axes' names.
        return self.step(*inputs[:-_CACHE_LISTS], None, *inputs[-_CACHE_LISTS:])


class ImageTokenizer(nn.Module):
    """pixels u8 [B, H, W, 3] -> codes int32 [B, h, w]."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.dtype = next(vqgan.encoder.parameters()).dtype
        vqgan.quantize.float()  # distances are fp32 whatever the features are

    def forward(self, pixels_BHW3: Tensor) -> Tensor:
        # TensorRT has uint8 at the border of a network only: the cast comes before all else.
        signed = to_signed(pixels_BHW3.float()).to(self.dtype)
        return self.vqgan.encode(signed).codes.to(torch.int32)


class SketchTokenizer(nn.Module):
    """class maps u8 [B, H, W] -> codes int32 [B, h, w]."""

    classes: Tensor

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.dtype = next(vqgan.encoder.parameters()).dtype
        vqgan.quantize.float()
        classes = torch.arange(vqgan.config.channels, dtype=torch.int32).view(-1, 1, 1)
        self.register_buffer("classes", classes)

    def forward(self, maps_BHW: Tensor) -> Tensor:
        # vqgan.one_hot as a comparison: runtimes' OneHot operators differ in the types they take.
        hot_BCHW = (maps_BHW.to(torch.int32)[:, None] == self.classes).to(self.dtype)
        return self.vqgan.encode(hot_BCHW).codes.to(torch.int32)


class ImageDetokenizer(nn.Module):
    """codes int32 [B, h, w] -> pixels u8 [B, H, W, 3]."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(self, codes_Bhw: Tensor) -> Tensor:
        # vqgan.to_bytes with the cast to uint8 last (see ImageTokenizer).
        signed_BHW3 = self.vqgan.decode(codes_Bhw).float().permute(0, 2, 3, 1)
        return ((signed_BHW3 + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class RankerScore(nn.Module):
    """token ids int32 [M], frames u8 [F, H, W, 3] -> score f32 []."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, tokens_M: Tensor, frames_FHW3: Tensor) -> Tensor:
        return self.ranker(tokens_M, frames_FHW3.float())  # see ImageTokenizer


@dataclass(frozen=True)
class Graph:
    """One graph to export: a module, example inputs in order, their dynamic axes, all names."""

    name: str
    module: nn.Module
    example: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


def graphs(checkpoint: Checkpoint, precision: str) -> list[Graph]:
    """The graphs of a bundle, in graph_names' order. The checkpoint is left as it was.

    A ranker is fp32 in any bundle: it is small, and its scores are compared with each other. With
    int8 so is everything but decoder_step's matrices; with fp8 all but these is as with bf16. With
    bf16 the tokenizers are fp16, which is finer: of bf16 there are no convolutions before opset 22.
    """
    dtype = DTYPES[precision]
    pictures = torch.float16 if dtype == torch.bfloat16 else dtype
    folded = fold(checkpoint.nuwa).to(dtype)
    quantized = QUANTIZED.get(precision)
    stepped = folded if quantized is None else quantized(fold(checkpoint.nuwa))
    found = [
        decoder_step(stepped, dtype),
        text_encoder(folded),
        image_tokenizer(_copy(checkpoint.vqgan, pictures)),
        image_detokenizer(_copy(checkpoint.vqgan, pictures)),
    ]
    if folded.visual is not None:
        found.append(visual_encoder(folded))
    if checkpoint.sketch_vqgan is not None:
        found.append(sketch_tokenizer(_copy(checkpoint.sketch_vqgan, pictures)))
    if checkpoint.ranker is not None:
        found.append(ranker(checkpoint.ranker))
    return found


def _copy(vqgan: VQGAN, dtype: torch.dtype) -> VQGAN:
    copied = VQGAN(vqgan.config)
    copied.load_state_dict(vqgan.state_dict())
    return copied.to(dtype).eval().requires_grad_(False)


def decoder_step(folded: FoldedNUWA, dtype: torch.dtype) -> Graph:
    """One call of the decoder; T, S, C, m and W are dynamic, the number of cache entries is not."""
    config = folded.config
    layers, d = config.decoder.layers, config.decoder.width
    codebook = config.image.codebook_size
    T = Dim("T", min=1)
    m = Dim("m", min=1, max=visual_columns(config) + config.text.length)
    W, S, C = Dim("W", min=1, max=codebook), Dim("S", min=1), Dim("C", min=1)
    rows, columns = 5, 3

    # Every input needs a tensor of its own: the exporter merges inputs that are one object.
    def ids(*shape: int) -> Tensor:
        return torch.zeros(rows, *shape, dtype=torch.int32)

    def stored(entries: int) -> list[Tensor]:
        return [torch.zeros(2, entries, d, dtype=dtype) for _ in range(layers)]

    entries, remembered = cache_entries(config.decoder), ConditionLayout.of(config).entries
    visual = config.visual is not None
    example = (
        *(ids(), ids(3), ids(), ids(), ids(config.decoder.neighbour_count), ids(), ids(columns)),
        *(torch.ones(rows), ids(), torch.ones(rows), torch.ones(rows), torch.ones(rows), ids()),
        torch.arange(2, dtype=torch.int32),
        *([torch.zeros(columns, dtype=torch.int32)] if visual else []),
        *(stored(entries), stored(entries), stored(remembered), stored(remembered)),
    )
    per_row = {0: T}
    dynamic = (
        *(per_row for _ in range(6)),
        {0: T, 1: m},
        *(per_row for _ in range(6)),
        {0: W},
        *([{0: m}] if visual else []),
        *([{0: S}] * layers for _ in "kv"),
        *([{0: C}] * layers for _ in "kv"),
    )
    step = DecoderStep(cast(NUWA, folded))
    return Graph(
        DECODER_STEP,
        step if visual else TextOnlyStep(step),
        example,
        dynamic if visual else (dynamic,),
        decoder_step_inputs(config),
        decoder_step_outputs(layers),
    )


def text_encoder(folded: FoldedNUWA) -> Graph:
    """Prompt ids to every decoder layer's cross-attention keys and values."""
    config = folded.config
    ids = torch.zeros(2, config.text.length, dtype=torch.int32)
    outputs = condition_outputs(config.decoder.layers)
    dynamic = ({0: Dim("B", min=1)},)
    return Graph(
        TEXT_ENCODER, TextConditions(cast(NUWA, folded)), (ids,), dynamic, ["tokens"], outputs
    )


def visual_encoder(folded: FoldedNUWA) -> Graph:
    """Visual ids of any volumes to every decoder layer's cross-attention keys and values."""
    config, rows = folded.config, 5
    columns = visual_neighbours(config, config.decoder.grid).shape[1]
    shapes = ((rows,), (rows, 3), (rows, columns))
    example = tuple(torch.zeros(shape, dtype=torch.int32) for shape in shapes)
    per_row = {0: Dim("N", min=1)}
    return Graph(
        VISUAL_ENCODER,
        VisualConditions(cast(NUWA, folded)),
        example,
        (per_row, per_row, per_row),
        [*VISUAL_ENCODER_INPUTS],
        condition_outputs(config.decoder.layers),
    )


def image_tokenizer(vqgan: VQGAN) -> Graph:
    """Pixels to codes."""
    size = vqgan.config.resolution
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    dynamic = ({0: Dim("B", min=1)},)
    module = ImageTokenizer(vqgan)
    return Graph(IMAGE_TOKENIZER, module, (pixels,), dynamic, ["pixels"], ["codes"])


def sketch_tokenizer(vqgan: VQGAN) -> Graph:
    """Class maps to codes."""
    size = vqgan.config.resolution
    maps = torch.zeros(2, size, size, dtype=torch.uint8)
    dynamic = ({0: Dim("B", min=1)},)
    module = SketchTokenizer(vqgan)
    return Graph(SKETCH_TOKENIZER, module, (maps,), dynamic, ["class_maps"], ["codes"])


def ranker(trained: Ranker) -> Graph:
    """A prompt's ids and the frames of one sample to a score."""
    size = trained.config.resolution
    tokens = torch.zeros(trained.config.text.length, dtype=torch.int32)
    frames = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    dynamic = (None, {0: Dim("F", min=1)})
    module = RankerScore(copy.deepcopy(trained).eval().requires_grad_(False))
    return Graph(RANKER, module, (tokens, frames), dynamic, [*RANKER_INPUTS], ["score"])


def image_detokenizer(vqgan: VQGAN) -> Graph:
    """Codes to pixels."""
    size = vqgan.config.grid_size
    codes = torch.zeros(2, size, size, dtype=torch.int32)
    dynamic = ({0: Dim("B", min=1)},)
    module = ImageDetokenizer(vqgan)
    return Graph(IMAGE_DETOKENIZER, module, (codes,), dynamic, ["codes"], ["pixels"])


def write_graph(graph: Graph, path: Path, inline_limit: int = INLINE_LIMIT) -> None:
    """Exports one graph to `path`.

    Weights of more than `inline_limit` bytes in all go to a second file, `path` + ".data".
    """
    with _quiet():
        program = torch.onnx.export(
            graph.module,
            graph.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=graph.dynamic,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None, "dynamo=True returns a program"
    operators.attach(program.model)
    _forget_sources(program.model)
    _note_aliases(program.model, graph.module)
    weights = program.model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    ir.save(program.model, path, external_data=f"{path.name}.data" if size > inline_limit else None)


def _forget_sources(model: ir.Model) -> None:
    """The exporter notes at each node which lines of which files it comes from: a graph would be
    another one, with another hash, for every folder that the sources lie in, and tell its name.
    """
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _note_aliases(model: ir.Model, module: nn.Module) -> None:
    """Of parameters that are equal the exporter keeps one, and some it keeps under other names, as
    [C, 1, 1] or transposed: metadata names them.

    For readers that look weights up by name; JSON, {parameter: initializer}.
    """
    by_size: dict[int, dict[str, npt.NDArray]] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            by_size.setdefault(value.const_value.size, {})[name] = value.const_value.numpy()
    aliases: dict[str, str] = {}
    transposes: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if name in model.graph.initializers:
            continue
        wanted = TorchTensor(parameter.detach()).numpy()  # which has a type for bf16
        same = {
            other: array
            for other, array in by_size.get(wanted.size, {}).items()
            if array.dtype == wanted.dtype and array.shape[: wanted.ndim] in _turns(wanted)
        }
        # Of another shape only if there is none of its own.
        for other, array in sorted(same.items(), key=lambda each: each[1].ndim):
            if np.array_equal(array.reshape(array.shape[: wanted.ndim]), wanted):
                aliases[name] = other
                break
            if wanted.ndim == 2 and np.array_equal(array.T, wanted):
                transposes[name] = other
                break
    for key, found in ((WEIGHT_ALIASES, aliases), (WEIGHT_TRANSPOSES, transposes)):
        if found:
            model.metadata_props[key] = json.dumps(found)


def _turns(array: npt.NDArray) -> tuple[tuple[int, ...], ...]:
    """The shapes of an array and of its transpose."""
    return array.shape, array.shape[::-1]


@contextmanager
def _quiet():
    """The exporter's progress lines and advice, which mean nothing to who runs an export."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
