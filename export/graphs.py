"""A checkpoint's modules as ONNX graphs: names, dynamic axes, and the `nuwa` operators kept whole.

Each graph is a module with a tensors-only signature, exported by torch.onnx. Attention is
translated to one opaque node, whose function body (operators.py) is attached afterwards: the
exporter would inline it. Says nothing about whether the numbers are right; verify.py does.

Legend: T positions of a call, S slots, C condition slots, n neighbour columns, m cross columns,
W candidates to sort, B batch, M text length, d decoder width.
"""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    TEXT_ENCODER,
    decoder_step_inputs,
    decoder_step_outputs,
    text_encoder_outputs,
)
from nuwa.spec.plan import cache_entries
from nuwa.training import nearby  # noqa: F401  defines torch.ops.nuwa
from nuwa.training.checkpoint import Checkpoint
from nuwa.training.decode import DecoderStep, TextConditions
from nuwa.training.nuwa import NUWA
from nuwa.training.vqgan import VQGAN, to_signed

from . import operators
from .fold import FoldedNUWA, fold
from .translate import translations

OPSET = 20
INLINE_LIMIT = 1 << 30  # bytes; a file of more than 2 GiB is no valid protobuf
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


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


class ImageDetokenizer(nn.Module):
    """codes int32 [B, h, w] -> pixels u8 [B, H, W, 3]."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(self, codes_Bhw: Tensor) -> Tensor:
        # vqgan.to_bytes with the cast to uint8 last (see ImageTokenizer).
        signed_BHW3 = self.vqgan.decode(codes_Bhw).float().permute(0, 2, 3, 1)
        return ((signed_BHW3 + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


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
    """The four graphs of a bundle. The checkpoint is left as it was."""
    dtype = DTYPES[precision]
    folded = fold(checkpoint.nuwa).to(dtype)
    return [
        decoder_step(folded, dtype),
        text_encoder(folded),
        image_tokenizer(_copy(checkpoint.vqgan, dtype)),
        image_detokenizer(_copy(checkpoint.vqgan, dtype)),
    ]


def _copy(vqgan: VQGAN, dtype: torch.dtype) -> VQGAN:
    copied = VQGAN(vqgan.config)
    copied.load_state_dict(vqgan.state_dict())
    return copied.to(dtype).eval().requires_grad_(False)


def decoder_step(folded: FoldedNUWA, dtype: torch.dtype) -> Graph:
    """One call of the decoder; T, S, C, m and W are dynamic, the number of cache entries is not."""
    config = folded.config
    layers, d = config.decoder.layers, config.decoder.width
    codebook = config.image.codebook_size
    T, m = Dim("T", min=1), Dim("m", min=1, max=config.text.length)
    W, S, C = Dim("W", min=1, max=codebook), Dim("S", min=1), Dim("C", min=1)
    rows, columns = 5, 3

    # Every input needs a tensor of its own: the exporter merges inputs that are one object.
    def ids(*shape: int) -> Tensor:
        return torch.zeros(rows, *shape, dtype=torch.int32)

    def stored(entries: int) -> list[Tensor]:
        return [torch.zeros(2, entries, d, dtype=dtype) for _ in range(layers)]

    entries, length = cache_entries(config.decoder), config.text.length
    example = (
        *(ids(), ids(3), ids(), ids(), ids(config.decoder.neighbour_count), ids(), ids(columns)),
        *(torch.ones(rows), ids(), torch.ones(rows), torch.ones(rows), torch.ones(rows), ids()),
        torch.arange(2, dtype=torch.int32),
        *(stored(entries), stored(entries), stored(length), stored(length)),
    )
    per_row = {0: T}
    dynamic = (
        *(per_row for _ in range(6)),
        {0: T, 1: m},
        *(per_row for _ in range(6)),
        {0: W},
        *([{0: S}] * layers for _ in "kv"),
        *([{0: C}] * layers for _ in "kv"),
    )
    return Graph(
        DECODER_STEP,
        DecoderStep(cast(NUWA, folded)),
        example,
        dynamic,
        decoder_step_inputs(layers),
        decoder_step_outputs(layers),
    )


def text_encoder(folded: FoldedNUWA) -> Graph:
    """Prompt ids to every decoder layer's cross-attention keys and values."""
    config = folded.config
    ids = torch.zeros(2, config.text.length, dtype=torch.int32)
    outputs = text_encoder_outputs(config.decoder.layers)
    dynamic = ({0: Dim("B", min=1)},)
    return Graph(
        TEXT_ENCODER, TextConditions(cast(NUWA, folded)), (ids,), dynamic, ["tokens"], outputs
    )


def image_tokenizer(vqgan: VQGAN) -> Graph:
    """Pixels to codes."""
    size = vqgan.config.resolution
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    dynamic = ({0: Dim("B", min=1)},)
    module = ImageTokenizer(vqgan)
    return Graph(IMAGE_TOKENIZER, module, (pixels,), dynamic, ["pixels"], ["codes"])


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
    weights = program.model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    ir.save(program.model, path, external_data=f"{path.name}.data" if size > inline_limit else None)


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
