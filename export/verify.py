"""Compares the graphs of a bundle, run by ONNX Runtime, with the PyTorch model they came from.

PyTorch runs the checkpoint as it is: fp32, nothing folded. parity.py says which figures refuse an
export.

The decoder is run as serving runs it, each cache bound as input and output at once. Its tokens are
judged twice: against PyTorch's, and against PyTorch's sampler given the graph's own logits, where
rounding of the model no longer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnxruntime import OrtValue
from torch import Tensor

from nuwa.spec.manifest import (
    DECODER_STEP,
    GRAPHS,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    STEP_ROW_INPUTS,
    TEXT_ENCODER,
    decoder_step_outputs,
    graph_file,
    layer_names,
    text_encoder_outputs,
)
from nuwa.spec.plan import cache_entries
from nuwa.training.checkpoint import Checkpoint
from nuwa.training.decode import DecoderStep, TextConditions
from nuwa.training.sampling import sample
from nuwa.training.vqgan import to_bytes, to_signed

from .cases import SLOTS, Feeds, RealSteps, pictures, random_steps, text_ids
from .parity import Figures

_COMPARED_CALLS = 12  # of real decoding, evenly spread over it
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}
_SAMPLING_INPUTS = ("temperature", "top_k", "top_p", "uniform", "ranks")


def verify(
    checkpoint: Checkpoint,
    folder: Path,
    precision: str,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Parity figures of the four graphs in `folder`; ExportError if any is beyond its limit."""
    figures = {}
    for name in GRAPHS:
        if progress is not None:
            progress(name)
        figures[name] = verify_graph(checkpoint, folder / graph_file(name), name, precision)
    figures["versions"] = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    return figures


@torch.no_grad()
def verify_graph(checkpoint: Checkpoint, path: Path, name: str, precision: str) -> dict[str, Any]:
    """Parity figures of the file `path` as the graph `name`; ExportError beyond a limit."""
    figures = Figures()
    _VERIFIERS[name](checkpoint, OnnxGraph(path), figures)
    return figures.check(name, precision)


class OnnxGraph:
    """One file on ONNX Runtime's CPU provider; runs on numpy arrays, in place where asked."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are about fusions it could not make
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.types = {value.name: _NUMPY[value.type] for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def stored(self, feeds: Feeds) -> Feeds:
        """The feeds as copies of the types that the graph takes."""
        return {name: np.array(array, self.types[name]) for name, array in feeds.items()}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray]:
        """Outputs by name; an output `x_out` shares the memory of the input `x`."""
        values = {n: OrtValue.ortvalue_from_numpy(array) for n, array in feeds.items()}
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            shared = name.removesuffix("_out")
            if shared in values:
                binding.bind_ortvalue_output(name, values[shared])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        results = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: np.array(value.numpy()) for name, value in results}


def _decoder_step(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    reference = Reference(checkpoint)
    for feeds in random_steps(checkpoint.config):
        given = graph.stored(feeds)
        wanted = reference.step(given)
        _compare_step(given, graph.run(given | _copies(given)), wanted, figures)
    for given, wanted in _real_steps(checkpoint, graph, reference):
        _compare_step(given, graph.run(given | _copies(given)), wanted, figures)


def _copies(feeds: Feeds) -> Feeds:
    """Copies of the caches, which a run overwrites."""
    return {name: array.copy() for name, array in feeds.items() if "_cache_" in name}


def _real_steps(
    checkpoint: Checkpoint, graph: OnnxGraph, reference: Reference
) -> Iterator[tuple[Feeds, Feeds]]:
    """Feeds and PyTorch's outputs of calls spread over a real decoding."""
    config = checkpoint.config
    ids = text_ids(checkpoint.text_tokenizer)
    steps = RealSteps(config, ids)
    state = reference.conditions(ids)
    shape = (SLOTS, cache_entries(config.decoder), config.decoder.width)
    for kind in ("key_cache", "value_cache"):
        names = layer_names(kind, config.decoder.layers)
        state |= {name: np.zeros(shape, np.float32) for name in names}
    compared = set(np.linspace(0, steps.calls - 1, _COMPARED_CALLS).astype(int))
    for call in range(steps.calls):
        given = graph.stored(steps.feeds(call) | state)
        wanted = reference.step(given)
        if call in compared:
            yield given, wanted
        steps.report(call, wanted["next_tokens"])
        outputs = {name: value for name, value in wanted.items() if name.endswith("_out")}
        state |= {name.removesuffix("_out"): value for name, value in outputs.items()}


def _compare_step(given: Feeds, got: Feeds, wanted: Feeds, figures: Figures) -> None:
    figures.differ("logits", got["logits"], wanted["logits"])
    figures.mismatch("token_mismatches", got["next_tokens"], wanted["next_tokens"])
    logits = torch.from_numpy(got["logits"])
    drawn = sample(logits, *(torch.from_numpy(given[name]) for name in _SAMPLING_INPUTS)).numpy()
    figures.mismatch("sampler_mismatches", got["next_tokens"], drawn)
    writes = given["write_index"] >= 0
    written = given["slot"][writes], given["write_index"][writes]
    for name in (name for name in got if name.endswith("_out")):
        figures.differ("cache", got[name][written], wanted[name][written])
        before, after = given[name.removesuffix("_out")].copy(), got[name].copy()
        before[written] = after[written] = 0
        figures.mismatch("overwritten_entries", after, before)


def _text_encoder(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    ids = text_ids(checkpoint.text_tokenizer)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, checkpoint.config.text.vocabulary_size, (3, ids.shape[1]), np.int32)
    for batch in (ids, ids[:1], noise):
        got, wanted = graph.run({"tokens": batch}), Reference(checkpoint).conditions(batch)
        for name, value in wanted.items():
            figures.differ("memory", got[name], value)


def _image_tokenizer(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    images = pictures(checkpoint.config.image.resolution)
    codes_KE = checkpoint.vqgan.quantize.embedding.weight.double()
    for batch in (images, images[:1]):
        encoded = checkpoint.vqgan.encode(to_signed(torch.from_numpy(batch)))
        got = graph.run({"pixels": batch})["codes"]
        figures.mismatch("code_mismatches", got, encoded.codes.numpy())
        cells_NE = encoded.features.permute(0, 2, 3, 1).flatten(0, 2).double()
        distance_NK = torch.cdist(cells_NE, codes_KE).square()
        chosen_N = distance_NK.gather(1, torch.from_numpy(got).long().view(-1, 1))[:, 0]
        excess_N = chosen_N - distance_NK.min(dim=1).values
        figures.exceed("code_distance", excess_N.numpy(), distance_NK.std(dim=1).numpy())


def _image_detokenizer(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    config = checkpoint.config.image
    images = torch.from_numpy(pictures(config.resolution))
    real = checkpoint.vqgan.encode(to_signed(images)).codes.numpy().astype(np.int32)
    rng = np.random.default_rng(0)
    random = rng.integers(0, config.codebook_size, (3, *real.shape[1:]), np.int32)
    for codes in (real, real[:1], random):
        wanted = to_bytes(checkpoint.vqgan.decode(torch.from_numpy(codes))).numpy()
        figures.differ_pixels(graph.run({"codes": codes})["pixels"], wanted)


_VERIFIERS: dict[str, Callable[[Checkpoint, OnnxGraph, Figures], None]] = {
    DECODER_STEP: _decoder_step,
    TEXT_ENCODER: _text_encoder,
    IMAGE_TOKENIZER: _image_tokenizer,
    IMAGE_DETOKENIZER: _image_detokenizer,
}


class Reference:
    """The checkpoint's model in PyTorch, with the names and types of the graphs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.layers = checkpoint.config.decoder.layers
        self._step = DecoderStep(checkpoint.nuwa)
        self._conditions = TextConditions(checkpoint.nuwa)

    def conditions(self, ids: npt.NDArray[np.int32]) -> Feeds:
        """text_encoder's outputs."""
        keys, values = self._conditions(torch.from_numpy(ids))
        arrays = [tensor.numpy() for tensor in (*keys, *values)]
        return dict(zip(text_encoder_outputs(self.layers), arrays, strict=True))

    def step(self, feeds: Feeds) -> Feeds:
        """decoder_step's outputs; caches of any precision in, fp32 out."""
        rows = [_tensor(feeds[name]) for name in (*STEP_ROW_INPUTS, "ranks")]
        kinds = ("key_cache", "value_cache", "cross_key", "cross_value")
        lists = [[_tensor(feeds[n]) for n in layer_names(kind, self.layers)] for kind in kinds]
        token_T, logits_TK, keys, values = self._step(*rows, *lists)
        arrays = [tensor.numpy() for tensor in (token_T, logits_TK, *keys, *values)]
        return dict(zip(decoder_step_outputs(self.layers), arrays, strict=True))


def _tensor(array: npt.NDArray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor
