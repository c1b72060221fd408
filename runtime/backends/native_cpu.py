"""decoder_step as native code (runtime/native), on the processor's widest vectors.

The weights are those of the bundle's decoder_step.onnx, packed anew; the caches are plain arrays.
Everything else of a bundle runs on ONNX Runtime. What a row computes does not depend on the other
rows of a call, so a request draws the same tokens in any company.

Legend: S cache slots, R entries a slot, d width, L layers, K codebook size.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Int
from nuwa.spec.manifest import DECODER_STEP, step_call_inputs

from ..bundle import Bundle
from ..errors import UnavailableError
from ..onnx_weights import Weights, read_weights
from .base import NATIVE_CPU, Float, StepBatch
from .onnxruntime_graphs import OnnxRuntimeGraphs, allocate, cache_names

log = logging.getLogger("nuwa.runtime")

_ABI_VERSION = 1  # kAbiVersion of native/decoder_abi.h
LEVELS = (4, 3, 0)  # x86-64 levels of the libraries, best first; 0 runs anywhere
_TYPES = dict.fromkeys(("temperature", "top_p", "uniform", "guidance"), np.float32)
_PREFIX = "nuwa."  # of the decoder's weights in decoder_step.onnx
_BLOCK_WEIGHTS = (
    *("self_norm.weight", "self_norm.bias", "self_qkv.weight"),
    *("self_out.weight", "self_out.bias"),
    *("cross_norm.weight", "cross_norm.bias", "cross_q.weight"),
    *("cross_out.weight", "cross_out.bias"),
    *("ff_norm.weight", "ff_norm.bias", "ff_in.weight", "ff_in.bias"),
    *("ff_out.weight", "ff_out.bias"),
    *("bias", "cross_bias"),
)
_HEAD_WEIGHTS = ("head_norm.weight", "head_norm.bias", "head.weight", "head.bias")


class _Shape(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("width", "layers", "heads", "codebook", "hidden", "bos")),
        *((name, c_int32) for name in ("cross_table", "positions")),
        ("position_starts", c_int32 * 3),
        ("column_bounds", c_void_p),
    ]


class _Layer(Structure):
    _fields_ = [(name.replace(".", "_"), c_void_p) for name in _BLOCK_WEIGHTS]


class _Weights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "positions")),
        *((name.replace(".", "_"), c_void_p) for name in _HEAD_WEIGHTS),
        ("layers", POINTER(_Layer)),
    ]


class _Step(Structure):
    _sizes = ("neighbour_columns", "cross_neighbour_columns", "cache_entries", "condition_entries")
    _rows = (
        *("tokens", "coordinates", "slot", "write_index", "neighbours"),
        *("condition_slot", "cross_neighbours", "cross_columns"),
        *("temperature", "top_k", "top_p", "uniform", "guidance", "unconditional_row"),
    )
    _memory = ("key_caches", "value_caches", "cross_keys", "cross_values")
    _fields_ = [
        ("rows", c_int32),
        *((name, c_int32) for name in _sizes),
        *((name, c_void_p) for name in (*_rows, *_memory, "next_tokens", "logits")),
    ]


class NativeCpu(OnnxRuntimeGraphs):
    """A backend; UnavailableError where no library fits.

    Arguments as of OnnxRuntimeCpu. Weights and caches are fp32 whatever the bundle stores; spinning
    concerns the encoders and tokenizers only. level: of the library, one of LEVELS; None means the
    best one that machine and model allow.
    """

    name = NATIVE_CPU

    def __init__(
        self,
        bundle: Bundle,
        *,
        cache_slots: int,
        condition_slots: int,
        threads: int | None = None,
        spinning: bool = False,
        logits: bool = False,
        level: int | None = None,
    ) -> None:
        config, manifest = bundle.manifest.config, bundle.manifest
        self._library = _library_for(config, level)
        weights = _decoder_weights(bundle)  # before all else, should they not be there
        super().__init__(
            bundle,
            condition_slots=condition_slots,
            threads=threads,
            spinning=spinning,
            storage=np.float32,
        )
        layers, width = config.decoder.layers, config.decoder.width
        shape = (cache_slots, manifest.cache_entries, width)
        self.caches = allocate(cache_names(layers), shape, np.float32)
        self.logits: Float | None = None
        self._keep_logits, self._codebook_size = logits, config.image.codebook_size
        self._call_inputs = [name for name in step_call_inputs(config) if name != "ranks"]
        self._memory = [
            _pointers([arrays[f"{kind}_{layer}"] for layer in range(layers)])
            for arrays, kinds in (
                (self.caches, ("key_cache", "value_cache")),
                (self.conditions, ("cross_key", "cross_value")),
            )
            for kind in kinds
        ]
        self._entries = (manifest.cache_entries, self._layout.entries)
        self._process = os.getpid()
        self._decoder = _new_decoder(self._library, config, weights, self.threads)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None) and os.getpid() == self._process:
            self._library.nuwa_decoder_free(self._decoder)

    def step(self, batch: StepBatch) -> Int:
        if os.getpid() != self._process:
            raise RuntimeError("a forked process has none of the decoder's threads; load it there")
        rows = len(batch.tokens)
        tokens = np.empty(rows, np.int32)
        if self._keep_logits:
            self.logits = np.empty((rows, self._codebook_size), np.float32)
        call = _Step(
            rows, batch.neighbours.shape[1], batch.cross_neighbours.shape[1], *self._entries
        )
        held = [  # as long as the call
            np.ascontiguousarray(getattr(batch, name), _TYPES.get(name, np.int32))
            for name in self._call_inputs
        ]
        for name, array in zip(self._call_inputs, held, strict=True):
            setattr(call, name, array.ctypes.data)
        for name, pointers in zip(_Step._memory, self._memory, strict=True):
            setattr(call, name, ctypes.addressof(pointers))
        call.next_tokens = tokens.ctypes.data
        call.logits = None if self.logits is None else self.logits.ctypes.data
        if self._library.nuwa_decoder_step(self._decoder, byref(call)):
            raise MemoryError(f"no memory for a step of {rows} rows")
        return tokens


def _library_for(config: ModelConfig, level: int | None) -> ctypes.CDLL:
    """The library of a level, or of the best one that the machine and the model's sizes allow.

    Without a level none with vectors narrower than the machine's AVX2: ONNX Runtime has wider ones.
    """
    best = _load(0).nuwa_best_level()
    levels = [each for each in LEVELS if each <= best and (each or not best)]
    if level is not None:
        if level > best:
            raise UnavailableError(f"this machine runs level {best} at most, not level {level}")
        levels = [level]
    reasons = []
    for each in levels:
        try:
            library = _load(each)
        except UnavailableError as error:
            reasons.append(str(error))
            continue
        reason = _misfit(config, library.nuwa_lanes())
        if not reason:
            log.debug("the native decoder runs at level %d", each)
            return library
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


@cache
def _load(level: int) -> ctypes.CDLL:
    name = f"libnuwa_cpu{f'_{level}' if level else ''}.so"
    # An editable install has its libraries in another folder than its sources.
    folders = [Path(folder) / "native" for folder in sys.modules["nuwa.runtime"].__path__]
    for folder in folders:
        if (folder / name).is_file():
            break
    else:
        raise UnavailableError(
            f"{name} was not built: installing nuwa-runtime where there is a C++ compiler builds it"
        )
    try:
        library = ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise UnavailableError(f"{folder / name} cannot be loaded: {error}") from None
    library.nuwa_decoder_new.restype = c_void_p
    library.nuwa_decoder_new.argtypes = [POINTER(_Shape), POINTER(_Weights), c_int32]
    library.nuwa_decoder_step.argtypes = [c_void_p, POINTER(_Step)]
    library.nuwa_decoder_free.argtypes = [c_void_p]
    library.nuwa_decoder_free.restype = None
    version = library.nuwa_abi_version()
    if version != _ABI_VERSION:
        raise UnavailableError(
            f"{folder / name} is of another version ({version}, this is {_ABI_VERSION}); install "
            f"nuwa-runtime again"
        )
    return library


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
    """f32 arrays by the names of _weight_shapes; UnavailableError if the bundle does not say."""
    found = read_weights(bundle.graph(DECODER_STEP))
    weights = {}
    for name, shape in _weight_shapes(bundle.manifest.config).items():
        full = _PREFIX + name
        array = found.get(full, found.get(f"step.{full}"))  # a text-only model's are one deeper
        if array is None or array.shape != shape:
            has = "no weights" if array is None else f"weights of shape {array.shape} as"
            raise UnavailableError(
                f"{DECODER_STEP}.onnx has {has} {full}, where {shape} are needed; export the "
                f"checkpoint again"
            )
        weights[name] = np.ascontiguousarray(array, np.float32)
    return weights


def _new_decoder(
    library: ctypes.CDLL, config: ModelConfig, weights: Weights, threads: int
) -> c_void_p:
    decoder, grid = config.decoder, config.decoder.grid

    def pointers(names: Sequence[str]) -> list[int | None]:
        return [weights[name].ctypes.data if name in weights else None for name in names]

    layers = (_Layer * decoder.layers)(
        *(
            _Layer(*pointers([f"blocks.{layer}.{name}" for name in _BLOCK_WEIGHTS]))
            for layer in range(decoder.layers)
        )
    )
    made = _Weights(
        *pointers(["embedding.tokens", "embedding.positions.table", *_HEAD_WEIGHTS]), layers
    )
    columns = [decoder.neighbour_columns(layer) for layer in range(decoder.layers)]
    bounds = np.array(columns, np.int32)
    shape = _Shape(
        width=decoder.width,
        layers=decoder.layers,
        heads=decoder.heads,
        codebook=config.image.codebook_size,
        hidden=_hidden(config),
        bos=config.bos,
        cross_table=_cross_table(config),
        positions=grid.frames + grid.height + grid.width,
        position_starts=(0, grid.frames, grid.frames + grid.height),
        column_bounds=bounds.ctypes.data,
    )
    address = library.nuwa_decoder_new(byref(shape), byref(made), threads)
    if not address:
        raise UnavailableError(f"there is no memory for a decoder, or no {threads} threads")
    return c_void_p(address)


def _pointers(arrays: list[npt.NDArray]) -> ctypes.Array:
    return (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
