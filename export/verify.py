"""Compares the graphs of a bundle, run by ONNX Runtime, with the PyTorch model they came from.

PyTorch runs the checkpoint as it is: fp32, nothing folded. parity.py says which figures refuse an
export.

The decoder is run as serving runs it, each cache bound as input and output at once. Its tokens are
judged by its own logits (draws.py); how many differ from PyTorch's is recorded. What is bf16 runs
in fp32 (spec/onnx_file.py).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnxruntime import OrtValue
from torch import Tensor

from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    RANKER,
    SKETCH_TOKENIZER,
    STEP_ROW_INPUTS,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    VISUAL_ENCODER_INPUTS,
    condition_outputs,
    decoder_step_outputs,
    graph_file,
    graph_names,
    layer_names,
)
from nuwa.spec.onnx_file import widen
from nuwa.spec.plan import cache_entries
from nuwa.training.checkpoint import Checkpoint
from nuwa.training.decode import DecoderStep, TextConditions, VisualConditions
from nuwa.training.nuwa import NUWA
from nuwa.training.vqgan import VQGAN, one_hot, to_bytes, to_signed

from .cases import (
    NONE_PROMPT,
    SLOT_PROMPTS,
    SLOTS,
    VISUAL_SLOT,
    Feeds,
    RealSteps,
    class_maps,
    pictures,
    random_steps,
    text_ids,
    visual_feeds,
    visual_volumes,
)
from .draws import draw_errors
from .fold import FoldedNUWA, fold
from .parity import Figures
from .quantize import QUANTIZED

_SMALL_PICTURE = 128  # pixels; of larger ones, half as many are tried
_BF16 = (DECODER_STEP, TEXT_ENCODER, VISUAL_ENCODER)  # of a bundle of that precision
_COMPARED_CALLS = 12  # of real decoding, evenly spread over it
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


def verify(
    checkpoint: Checkpoint,
    folder: Path,
    precision: str,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Parity figures of all graphs in `folder`; ExportError if any is beyond its limit."""
    figures = {}
    for name in graph_names(checkpoint.config, checkpoint.ranker is not None):
        if progress is not None:
            progress(name)
        figures[name] = verify_graph(checkpoint, folder / graph_file(name), name, precision)
    figures["versions"] = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    return figures


@torch.no_grad()
def verify_graph(checkpoint: Checkpoint, path: Path, name: str, precision: str) -> dict[str, Any]:
    """Parity figures of the file `path` as the graph `name`; ExportError beyond a limit."""
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        if precision in ("bf16", "fp8") and name in _BF16:
            widen(path, path := Path(folder) / path.name)
        _VERIFIERS[name](checkpoint, OnnxGraph(path), figures)
        if name == DECODER_STEP and precision in QUANTIZED:
            stepped = QUANTIZED[precision](fold(checkpoint.nuwa)).float()
            _quantized_step(Reference(checkpoint, stepped), OnnxGraph(path), figures)
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


def _quantized_step(reference: Reference, graph: OnnxGraph, figures: Figures) -> None:
    """int8 against the same int8 in PyTorch: alike but where a rounding falls the other way.

    That moves a row's logits by up to some hundredths, but few rows have one: so of each row the
    logit that is most off counts, and of all rows the median. fp8 has the same weights in both.
    """
    errors = []
    for feeds in random_steps(reference.config):
        given = graph.stored(feeds)
        wanted_TK = reference.step(given)["logits"]
        error_TK = np.abs(graph.run(given | _copies(given))["logits"] - wanted_TK)
        errors.append(error_TK.max(axis=1) / np.abs(wanted_TK).max())
    figures.exceed("quantized_error", float(np.median(np.concatenate(errors))))


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
    state = _condition_slots(checkpoint, reference, ids)
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


def _condition_slots(
    checkpoint: Checkpoint, reference: Reference, ids_BM: npt.NDArray[np.int32]
) -> Feeds:
    """decoder_step's cross keys and values for `RealSteps`, PyTorch's."""
    config = checkpoint.config
    layout = ConditionLayout.of(config)
    texts = reference.conditions(ids_BM)
    seen = reference.see(_real_volume(checkpoint)) if config.visual is not None else {}
    shape = (len(SLOT_PROMPTS), layout.entries, config.decoder.width)
    slots = {name: np.zeros(shape, np.float32) for name in texts}
    for name, memory_CRd in slots.items():
        memory_CRd[:, : layout.none] = texts[name][list(SLOT_PROMPTS)]
        memory_CRd[:, layout.none : layout.visual] = texts[name][NONE_PROMPT]
        if seen:
            memory_CRd[VISUAL_SLOT, layout.visual :] = seen[name]
    return slots


def _real_volume(checkpoint: Checkpoint) -> Feeds:
    """visual_encoder's feeds for a clip: a sketch where there are any, else half a picture."""
    config, vqgan = checkpoint.config, checkpoint.sketch_vqgan
    grid, frame = config.decoder.grid, np.arange(config.decoder.grid.frames)
    if vqgan is not None:
        codes = vqgan.encode(_hot(vqgan, _class_maps(vqgan))).codes
        ids = codes.numpy()[frame % len(codes)] + config.image.codebook_size
    else:
        codes = checkpoint.vqgan.encode(to_signed(torch.from_numpy(_pictures(checkpoint)))).codes
        ids = codes.numpy()[frame % len(codes)]
        ids[:, :, grid.width // 2 :] = config.hidden
    return visual_feeds(config, [(grid, ids.reshape(-1))])


def _compare_step(given: Feeds, got: Feeds, wanted: Feeds, figures: Figures) -> None:
    figures.differ("logits", got["logits"], wanted["logits"])
    figures.mismatch("token_mismatches", got["next_tokens"], wanted["next_tokens"])
    errors_T = draw_errors(
        got["logits"],
        given["temperature"],
        given["top_k"],
        given["top_p"],
        given["uniform"],
        got["next_tokens"],
    )
    figures.exceed("draw_error", float(errors_T.max()))
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


def _visual_encoder(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    reference = Reference(checkpoint)
    for feeds in (*visual_volumes(checkpoint.config), _real_volume(checkpoint)):
        got, wanted = graph.run(feeds), reference.see(feeds)
        for name, value in wanted.items():
            figures.differ("memory", got[name], value)


def _image_tokenizer(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    for batch in _pairs(_pictures(checkpoint)):
        codes = graph.run({"pixels": batch})["codes"]
        _compare_codes(checkpoint.vqgan, to_signed(torch.from_numpy(batch)), codes, figures)


def _sketch_tokenizer(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    vqgan = checkpoint.sketch_vqgan
    assert vqgan is not None, "a config with sketches has their tokenizer"
    for batch in _pairs(_class_maps(vqgan)):
        codes = graph.run({"class_maps": batch})["codes"]
        _compare_codes(vqgan, _hot(vqgan, batch), codes, figures)


def _compare_codes(
    vqgan: VQGAN, inputs_BCHW: Tensor, got: npt.NDArray[np.int32], figures: Figures
) -> None:
    """Codes say little about features, plain backgrounds much about rounding: see `implied_error`.

    GroupNorm divides by the deviation of a plain background, which is close to nothing; PyTorch's
    own fp32 features are off by up to 1 % there, so features in fp64 are the judge.
    """
    exact = copy.deepcopy(vqgan).double()
    encoded, truth_BEhw = vqgan.encode(inputs_BCHW), exact.features(inputs_BCHW.double())
    figures.mismatch("code_mismatches", got, encoded.codes.numpy())
    scale = truth_BEhw.norm(dim=1).max()
    own_Bhw = (encoded.features - truth_BEhw).norm(dim=1)
    implied_Bhw = implied_error(truth_BEhw, exact.quantize.embedding.weight, got)
    beyond = (implied_Bhw - 2.0 * own_Bhw).clamp_min(0.0)
    figures.exceed("features_relative", float(beyond.max() / scale))


def implied_error(truth_BEhw: Tensor, codes_KE: Tensor, chosen_Bhw: npt.NDArray) -> Tensor:
    """[B, h, w]: how far features must be from the true ones, at least, to give these codes.

    If z + x is nearer to code c than to code b, and z nearer to b, then x has at least the length
    (|z - c|^2 - |z - b|^2) / (2 |c - b|).
    """
    z_NE = truth_BEhw.permute(0, 2, 3, 1).flatten(0, 2)
    distance_NK = torch.cdist(z_NE, codes_KE, compute_mode="donot_use_mm_for_euclid_dist").square()
    least_N, best_N = distance_NK.min(dim=1)
    chosen_N = torch.from_numpy(chosen_Bhw).long().flatten()
    excess_N = distance_NK.gather(1, chosen_N[:, None])[:, 0] - least_N
    apart_N = (codes_KE[chosen_N] - codes_KE[best_N]).norm(dim=1)
    error_N = torch.where(apart_N > 0, excess_N / (2.0 * apart_N), 0.0)
    return error_N.view(chosen_Bhw.shape)


def _image_detokenizer(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    size, rng = checkpoint.config.image.codebook_size, np.random.default_rng(0)
    for batch in _pairs(_pictures(checkpoint)):
        real = checkpoint.vqgan.encode(to_signed(torch.from_numpy(batch))).codes.numpy()
        random = rng.integers(0, size, real.shape)
        for codes in (real.astype(np.int32), random.astype(np.int32)):
            wanted = to_bytes(checkpoint.vqgan.decode(torch.from_numpy(codes))).numpy()
            figures.differ_pixels(graph.run({"codes": codes})["pixels"], wanted)


def _ranker(checkpoint: Checkpoint, graph: OnnxGraph, figures: Figures) -> None:
    assert checkpoint.ranker is not None, "a bundle with a ranker comes from a checkpoint with one"
    images, ids = _pictures(checkpoint), text_ids(checkpoint.text_tokenizer)
    for count in {1, checkpoint.config.decoder.grid.frames}:
        for begin, tokens in enumerate(ids):
            frames = images[np.arange(begin, begin + count) % len(images)]
            got = graph.run({"tokens": tokens, "frames": frames})["score"]
            wanted = checkpoint.ranker(torch.from_numpy(tokens), torch.from_numpy(frames))
            error = float(abs(got - wanted.numpy()))
            figures.exceed("score_error", error if np.isfinite(error) else np.inf)


def _pictures(checkpoint: Checkpoint) -> npt.NDArray[np.uint8]:
    return _few(pictures(checkpoint.config.image.resolution))


def _class_maps(vqgan: VQGAN) -> npt.NDArray[np.uint8]:
    return _few(class_maps(vqgan.config.resolution, vqgan.config.channels))


def _few(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return images[:: 1 if images.shape[1] <= _SMALL_PICTURE else 2]


def _hot(vqgan: VQGAN, maps_BHW: npt.NDArray[np.uint8]) -> Tensor:
    return one_hot(torch.from_numpy(maps_BHW), vqgan.config.channels)


def _pairs(images: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """The first picture alone, then two at a time: large ones take much memory."""
    yield images[:1]
    for begin in range(0, len(images), 2):
        yield images[begin : begin + 2]


_VERIFIERS: dict[str, Callable[[Checkpoint, OnnxGraph, Figures], None]] = {
    DECODER_STEP: _decoder_step,
    TEXT_ENCODER: _text_encoder,
    IMAGE_TOKENIZER: _image_tokenizer,
    IMAGE_DETOKENIZER: _image_detokenizer,
    VISUAL_ENCODER: _visual_encoder,
    SKETCH_TOKENIZER: _sketch_tokenizer,
    RANKER: _ranker,
}


class Reference:
    """The checkpoint's model in PyTorch, with the names and types of the graphs.

    stepped: what decodes, if not the checkpoint's model as it is.
    """

    def __init__(self, checkpoint: Checkpoint, stepped: FoldedNUWA | None = None) -> None:
        self.config = checkpoint.config
        self.layers = checkpoint.config.decoder.layers
        self._step = DecoderStep(checkpoint.nuwa if stepped is None else cast(NUWA, stepped))
        self._conditions = TextConditions(checkpoint.nuwa)
        self._visual = VisualConditions(checkpoint.nuwa)

    def conditions(self, ids: npt.NDArray[np.int32]) -> Feeds:
        """text_encoder's outputs."""
        return self._named(self._conditions(torch.from_numpy(ids)))

    def see(self, feeds: Feeds) -> Feeds:
        """visual_encoder's outputs."""
        return self._named(self._visual(*(_tensor(feeds[name]) for name in VISUAL_ENCODER_INPUTS)))

    def _named(self, pairs: tuple[list[Tensor], list[Tensor]]) -> Feeds:
        arrays = [tensor.numpy() for kind in pairs for tensor in kind]
        return dict(zip(condition_outputs(self.layers), arrays, strict=True))

    def step(self, feeds: Feeds) -> Feeds:
        """decoder_step's outputs; caches of any precision in, fp32 out."""
        rows: list[Tensor | None] = [_tensor(feeds[name]) for name in (*STEP_ROW_INPUTS, "ranks")]
        rows.append(_tensor(feeds["cross_columns"]) if "cross_columns" in feeds else None)
        kinds = ("key_cache", "value_cache", "cross_key", "cross_value")
        lists = [[_tensor(feeds[n]) for n in layer_names(kind, self.layers)] for kind in kinds]
        token_T, logits_TK, keys, values = self._step(*rows, *lists)
        arrays = [tensor.numpy() for tensor in (token_T, logits_TK, *keys, *values)]
        return dict(zip(decoder_step_outputs(self.layers), arrays, strict=True))


def _tensor(array: npt.NDArray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.is_floating_point() else tensor
