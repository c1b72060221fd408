"""A bundle's graphs as native code (runtime/native), on the processor's widest vectors.

Here decoder_step; the encoders are in native_encoders.py, tokenizers and detokenizer in
native_frames.py. The weights are those of the bundle's graphs, packed anew; the caches are plain
arrays. An encoder or tokenizer of other sizes than this code can run is left to ONNX Runtime. What
a row computes does not depend on the other rows of a call, so a request draws the same tokens in
any company.

Legend: S cache slots, R entries a slot, d width, L layers, K codebook size.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Sequence
from ctypes import byref, c_double, c_void_p, pointer
from dataclasses import astuple
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Int
from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    layer_names,
)

from ..bundle import Bundle
from ..core import Until
from ..errors import UnavailableError
from ..onnx_weights import Weights, fitting, floats, read_weights
from .base import (
    CPU_PRECISIONS,
    NATIVE_CPU,
    CallDone,
    Float,
    Part,
    Rows,
    Stream,
    check_precision,
)
from .native_encoders import NativeEncoder
from .native_frames import NativeFrames
from .native_library import (
    BLOCK_WEIGHTS,
    HEAD_WEIGHTS,
    LEVELS,
    MATRICES,
    ROWS,
    AbiLane,
    AbiLayer,
    AbiMatrix,
    AbiPart,
    AbiShape,
    AbiStep,
    AbiStream,
    AbiWeights,
    load,
)
from .native_team import NativeTeam
from .onnxruntime_graphs import Frames, OnnxRuntimeGraphs, allocate, cache_names

log = logging.getLogger("nuwa.runtime")

_PREFIX = "nuwa."  # of the decoder's weights in decoder_step.onnx


class NativeCpu(OnnxRuntimeGraphs):
    """A backend; UnavailableError where no library fits.

    Arguments as of OnnxRuntimeCpu. Matrices are kept as the bundle stores them, caches and all else
    in fp32, in which all is computed but for products with matrices of bf16 and int8, to which rows
    are rounded; spinning concerns what is left to ONNX Runtime. rows: of usual calls, for which
    room is made at once; level: of the library, one of LEVELS, None for the best one that machine
    and model allow.
    """

    name = NATIVE_CPU

    def __init__(
        self,
        bundle: Bundle,
        *,
        cache_slots: int,
        condition_slots: int,
        rows: int = 0,
        threads: int | None = None,
        spinning: bool = False,
        logits: bool = False,
        level: int | None = None,
    ) -> None:
        config, manifest = bundle.manifest.config, bundle.manifest
        check_precision(self.name, manifest.precision, CPU_PRECISIONS)
        weights = _decoder_weights(bundle)  # before all else, should they not be there
        self._layers = config.decoder.layers
        self._library, level = _library_for(config, weights, level)
        super().__init__(
            bundle,
            condition_slots=condition_slots,
            threads=threads,
            spinning=spinning,
            storage=np.float32,
        )
        tiles = bool(self._library.nuwa_has_tiles())
        if tiles and manifest.precision in ("fp32", "fp16"):
            log.info(
                "this processor multiplies bf16 faster than %s (AMX): see nuwa export --precision",
                manifest.precision,
            )
        tiles = tiles and manifest.precision == "bf16"
        self.runs_on = f"native level {level}{' with AMX' if tiles else ''}, {self.runs_on}"
        layers, width = config.decoder.layers, config.decoder.width
        shape = (cache_slots, manifest.cache_entries, width)
        self.caches = allocate(cache_names(layers), shape, np.float32)
        self.logits: Float | None = None
        self._keep_logits, self._codebook_size = logits, config.image.codebook_size
        self._memory = [
            _pointers([arrays[f"{kind}_{layer}"] for layer in range(layers)])
            for arrays, kinds in (
                (self.caches, ("key_cache", "value_cache")),
                (self.conditions, ("cross_key", "cross_value")),
            )
            for kind in kinds
        ]
        self._step = AbiStep(
            neighbour_columns=config.decoder.neighbour_count,
            visual_columns=visual_columns(config),
            cache_entries=manifest.cache_entries,
            condition_entries=self._layout.entries,
            threads=self._cores.address,
        )
        for name, pointers in zip(AbiStep.MEMORY, self._memory, strict=True):
            setattr(self._step, name, ctypes.addressof(pointers))
        self._streams: dict[Stream, _Held] = {}
        self._make_room(1, 1)
        self._process = os.getpid()
        self._decoder = _new_decoder(self._library, config, weights, self.threads, rows)

    def _frame_graph(self, graph: str, *, whole: bool = False) -> Frames:
        narrow = self.bundle.manifest.precision == "bf16"
        try:
            team = self._painting if graph == IMAGE_DETOKENIZER else self._preparing
            return NativeFrames(team, self.bundle, graph, narrow=narrow)
        except UnavailableError as error:
            log.info("%s runs on ONNX Runtime: %s", graph, error)
            return super()._frame_graph(graph, whole=whole)

    def _load_encoders(self) -> None:
        try:
            self._texts: NativeEncoder | None = self._encoder(TEXT_ENCODER)
        except UnavailableError as error:
            log.info("%s runs on ONNX Runtime: %s", TEXT_ENCODER, error)
            self._texts = None
            super()._load_encoders()

    @cached_property
    def _volumes(self) -> NativeEncoder | None:
        """The visual encoder; None for ONNX Runtime's."""
        try:
            return self._encoder(VISUAL_ENCODER)
        except UnavailableError as error:
            log.info("%s runs on ONNX Runtime: %s", VISUAL_ENCODER, error)
            return None

    def _encoder(self, graph: str) -> NativeEncoder:
        keys, values = (
            [self.conditions[name] for name in layer_names(kind, self._layers)]
            for kind in ("cross_key", "cross_value")
        )
        return NativeEncoder(self._preparing, self.bundle, graph, keys, values)

    @cached_property
    def _preparing(self) -> NativeTeam:
        return NativeTeam(self._library, self._cores)

    @cached_property
    def _painting(self) -> NativeTeam:
        return NativeTeam(self._library, self._cores)

    def encode_text(
        self, ids: Int, condition_slots: Sequence[int], first: int, *, busy: bool = False
    ) -> None:
        if self._texts is None:
            return super().encode_text(ids, condition_slots, first, busy=busy)
        text = self.bundle.manifest.config.text
        for row, slot in zip(ids, condition_slots, strict=True):
            # Nothing attends to padding, which comes last and is the last of the vocabulary.
            padding = text.mask_padding and row == text.vocabulary_size - 1
            used = len(row) - int(np.count_nonzero(padding))
            self._texts.run(row[:used], self._entries(slot, first, used), busy=busy)

    def encode_visual(
        self,
        tokens: Int,
        coordinates: Int,
        neighbours: Int,
        condition_slot: int,
        *,
        busy: bool = False,
    ) -> None:
        if self._volumes is None:
            return super().encode_visual(tokens, coordinates, neighbours, condition_slot, busy=busy)
        entries = self._entries(condition_slot, self._layout.visual, len(tokens))
        self._volumes.run(tokens, entries, coordinates, neighbours, busy=busy)

    def _entries(self, slot: int, first: int, count: int) -> Int:
        """Entries of a condition slot from `first` on, counted over all slots."""
        start = slot * self._layout.entries + first
        return np.arange(start, start + count, dtype=np.int32)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None) and os.getpid() == self._process:
            self._library.nuwa_decoder_free(self._decoder)

    def open(self, stream: Stream) -> None:
        self._streams[stream] = _Held(stream)

    def stage(self, stream: Stream) -> None:
        self._streams[stream].stage(stream.rows)

    def step(self, parts: Sequence[Part]) -> list[bool]:
        if self._keep_logits:
            rows = sum(part.count * len(part.stream.lanes) for part in parts)
            self.logits = np.zeros((rows, self._codebook_size), np.float32)
            self._step.logits = self.logits.ctypes.data
        (done,) = self._run([parts])
        return done.finite

    def steps(self, calls: Sequence[Sequence[Part]], until: Until) -> list[CallDone]:
        assert not self._keep_logits, "there is room for those of one call"
        self._step.stop, self._step.most_seconds = until.address, until.seconds
        try:
            return self._run(calls)
        finally:
            self._step.stop = None

    def _run(self, calls: Sequence[Sequence[Part]]) -> list[CallDone]:
        if os.getpid() != self._process:
            raise RuntimeError("a forked process has none of the decoder's threads; load it there")
        parts = [part for call in calls for part in call]
        if len(parts) > len(self._told) or len(calls) > len(self._seconds):
            self._make_room(max(len(parts), len(self._told)), max(len(calls), len(self._seconds)))
        told, each_call = self._told[: len(parts)], len(calls[0])
        for each, part in zip(told, parts, strict=True):
            each.stream = self._streams[part.stream].pointer
            each.first, each.count = part.first, part.count
        step = self._step
        step.call_count, step.part_count = len(calls), each_call
        if self._library.nuwa_decoder_step(self._decoder, byref(step)):
            raise MemoryError(f"no memory for a step of {each_call} streams")
        finite = [bool(each.finite) for each in told[: step.done * each_call]]
        return [
            CallDone(finite[call * each_call : (call + 1) * each_call], self._seconds[call])
            for call in range(step.done)
        ]

    def _make_room(self, parts: int, calls: int) -> None:
        """For what a step is told of so many parts, and tells of so many calls; written anew by
        each step.
        """
        called, self._seconds = (AbiPart * parts)(), (c_double * calls)()
        self._step.parts, self._told = called, list(called)
        self._step.seconds = ctypes.addressof(self._seconds)

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        return self._streams[stream].tokens[first : first + count].copy()

    def close(self, stream: Stream) -> None:
        self._streams.pop(stream, None)


class _Held:
    """A stream's tokens, its rows, and what the library is told of them."""

    def __init__(self, stream: Stream) -> None:
        self.tokens = np.zeros(stream.held, np.int32)
        self._told = AbiStream(
            tokens=self.tokens.ctypes.data,
            lanes=(AbiLane * 2)(*(AbiLane(*astuple(lane)) for lane in stream.lanes)),
            lane_count=len(stream.lanes),
            top_k=stream.sampling.top_k,
            temperature=stream.sampling.temperature,
            top_p=stream.sampling.top_p,
            guidance=stream.sampling.guidance_scale,
        )
        self.pointer = pointer(self._told)
        self.stage(stream.rows)

    def stage(self, rows: Rows) -> None:
        self._rows = rows  # as long as the library may read them
        for name in ROWS:
            array = getattr(rows, name)
            wanted = np.float32 if name == "uniform" else np.int32
            assert array is None or (array.dtype == wanted and array.flags.c_contiguous), name
            setattr(self._told, name, None if array is None else array.ctypes.data)


def _library_for(
    config: ModelConfig, weights: Weights, level: int | None
) -> tuple[ctypes.CDLL, int]:
    """(library, level) of a level, or of the best one that the machine and the model's sizes allow.

    Without a level none with vectors narrower than the machine's AVX2: ONNX Runtime has wider ones.
    """
    best = load(0).nuwa_best_level()
    levels = [each for each in LEVELS if each <= best and (each or not best)]
    if level is not None:
        if level > best:
            raise UnavailableError(f"this machine runs level {best} at most, not level {level}")
        levels = [level]
    reasons = []
    for each in levels:
        try:
            library = load(each)
        except UnavailableError as error:
            reasons.append(str(error))
            continue
        reason = _misfit(config, library.nuwa_lanes())
        if not reason and _is_whole(weights) and not library.nuwa_has_int8():
            reason = f"level {each} multiplies int8 with instructions that this machine lacks"
        if not reason:
            log.debug("the native decoder runs at level %d", each)
            return library, each
        reasons.append(reason)
    raise UnavailableError("; ".join(reasons))


def _misfit(config: ModelConfig, lanes: int) -> str:
    """Why a library with vectors of so many floats cannot run a model; "" if it can."""
    decoder = config.decoder
    sizes = {
        "width": (decoder.width, 2 * lanes),
        "feed-forward's hidden size": (_hidden(config), lanes),
        "width of a head": (decoder.width // decoder.heads, lanes),
    }
    for what, (size, multiple) in sizes.items():
        if size % multiple:
            return f"the model's {what}, {size}, is not a multiple of {multiple}"
    return ""


def _hidden(config: ModelConfig) -> int:
    return config.decoder.ff_multiplier * config.decoder.width


def _weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What the decoder needs, by name without _PREFIX; biases only where the model has them."""
    decoder, codebook = config.decoder, config.image.codebook_size
    d, hidden, grid = decoder.width, _hidden(config), decoder.grid
    norm = {"weight": (d,), "bias": (d,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.tokens": (codebook + 1, d),
        "embedding.positions.table": (grid.frames + grid.height + grid.width, d),
        "head.weight": (codebook, d),
        "head.bias": (codebook,),
        **{f"head_norm.{part}": shape for part, shape in norm.items()},
    }
    for layer in range(decoder.layers):
        first, last = decoder.neighbour_columns(layer)
        block: dict[str, tuple[int, ...]] = {
            "self_qkv.weight": (3 * d, d),
            "self_out.weight": (d, d),
            "self_out.bias": (d,),
            "cross_q.weight": (d, d),
            "cross_out.weight": (d, d),
            "cross_out.bias": (d,),
            "ff_in.weight": (2 * hidden, d),
            "ff_in.bias": (2 * hidden,),
            "ff_out.weight": (d, hidden),
            "ff_out.bias": (d,),
        }
        for name in ("self_norm", "cross_norm", "ff_norm"):
            block |= {f"{name}.{part}": shape for part, shape in norm.items()}
        if decoder.relative_bias:
            block["bias"] = (decoder.heads, last - first)
        if _cross_table(config):
            block["cross_bias"] = (decoder.heads, _cross_table(config))
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _cross_table(config: ModelConfig) -> int:
    """Columns of a layer's cross bias: those of the visual window, and text's; 0 without."""
    biased = config.visual is not None and config.visual.relative_bias
    return visual_columns(config) + 1 if biased else 0


def _decoder_weights(bundle: Bundle) -> Weights:
    """By the names of _weight_shapes: matrices f32, f16, bf16 (BF16) or, with scales beside them,
    int8 and transposed, all else f32.

    UnavailableError if the bundle does not say.
    """
    found = read_weights(bundle.graph(DECODER_STEP))
    weights = {}
    for name, shape in _weight_shapes(bundle.manifest.config).items():
        full = _PREFIX + name
        array = _find(found, full)
        scale = _find(found, _scale(full)) if name.endswith(MATRICES) else None
        shape = shape if scale is None else shape[::-1]
        array = fitting(array, DECODER_STEP, full, shape)
        whole = array.dtype == np.int8
        if whole != (scale is not None) or (scale is not None and scale.shape != shape[-1:]):
            raise UnavailableError(
                f"{DECODER_STEP}.onnx has no fitting scales for {full}; export the checkpoint again"
            )
        matrix = name.endswith(MATRICES)
        weights[name] = np.ascontiguousarray(array) if matrix else floats(array)
        if scale is not None:
            weights[_scale(name)] = np.ascontiguousarray(scale, np.float32)
    return weights


def _find(found: Weights, name: str) -> npt.NDArray | None:
    return found.get(name, found.get(f"step.{name}"))  # a text-only model's are one deeper


def _scale(name: str) -> str:
    """What the scales of an int8 matrix go by."""
    return name.removesuffix("weight") + "scale"


def _is_whole(weights: Weights) -> bool:
    return any(array.dtype == np.int8 for array in weights.values())


def _new_decoder(
    library: ctypes.CDLL, config: ModelConfig, weights: Weights, threads: int, rows: int
) -> c_void_p:
    decoder, grid = config.decoder, config.decoder.grid

    def address(name: str) -> int | None:
        return weights[name].ctypes.data if name in weights else None

    def given(prefix: str, names: Iterable[str]) -> list[AbiMatrix | int | None]:
        """Addresses of weights, with those of their scales where they may have some."""
        return [
            AbiMatrix.of(weights[prefix + name], weights.get(_scale(prefix + name)))
            if name in MATRICES
            else address(prefix + name)
            for name in names
        ]

    layers = (AbiLayer * decoder.layers)(
        *(AbiLayer(*given(f"blocks.{layer}.", BLOCK_WEIGHTS)) for layer in range(decoder.layers))
    )
    tables = given("", ["embedding.tokens", "embedding.positions.table"])
    made = AbiWeights(*tables, *given("", HEAD_WEIGHTS), layers)
    columns = [decoder.neighbour_columns(layer) for layer in range(decoder.layers)]
    bounds = np.array(columns, np.int32)
    shape = AbiShape(
        width=decoder.width,
        layers=decoder.layers,
        heads=decoder.heads,
        codebook=config.image.codebook_size,
        hidden=_hidden(config),
        bos=config.bos,
        cross_table=_cross_table(config),
        positions=grid.frames + grid.height + grid.width,
        rows=rows,
        position_starts=(0, grid.frames, grid.frames + grid.height),
        column_bounds=bounds.ctypes.data,
    )
    decoder_address = library.nuwa_decoder_new(byref(shape), byref(made), threads)
    if not decoder_address:
        raise UnavailableError(f"there is no memory for a decoder, or no {threads} threads")
    return c_void_p(decoder_address)


def _pointers(arrays: list[npt.NDArray]) -> ctypes.Array:
    return (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
