"""decoder_step as native code (runtime/native), on the processor's widest vectors.

The weights are those of the bundle's decoder_step.onnx, packed anew; the caches are plain arrays.
Everything else of a bundle runs on ONNX Runtime. What a row computes does not depend on the other
rows of a call, so a request draws the same tokens in any company.

Legend: S cache slots, R entries a slot, d width, L layers, K codebook size.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Int
from nuwa.spec.manifest import DECODER_STEP, step_call_inputs

from ..bundle import Bundle
from ..onnx_weights import Weights, read_weights
from .base import NATIVE_CPU, Float, StepBatch
from .onnxruntime_graphs import OnnxRuntimeGraphs, allocate, cache_names

_ABI_VERSION = 1  # kAbiVersion of native/decoder_abi.h
LEVELS = (4, 3, 0)  # x86-64 levels of the libraries, best first; 0 runs anywhere
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
_OPTIONAL = ("bias", "cross_bias")
_HEAD_WEIGHTS = ("head_norm.weight", "head_norm.bias", "head.weight", "head.bias")


class UnavailableError(Exception):
    """There is no library for this machine or for a model of these sizes; the message says why."""


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

    Arguments as of OnnxRuntimeCpu; spinning concerns the encoders and tokenizers only. level: of
    the library, one of LEVELS; None means the best one that machine and model allow.
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
        self._library = _library_for(config, LEVELS if level is None else (level,))
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
        weights = read_weights(bundle.graph(DECODER_STEP))
        self._decoder = _new_decoder(self._library, config, weights, self.threads)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self._library.nuwa_decoder_free(self._decoder)

    def step(self, batch: StepBatch) -> Int:
        rows = len(batch.tokens)
        tokens = np.empty(rows, np.int32)
        if self._keep_logits:
            self.logits = np.empty((rows, self._codebook_size), np.float32)
        call = _Step(
            rows, batch.neighbours.shape[1], batch.cross_neighbours.shape[1], *self._entries
        )
        held = [np.ascontiguousarray(getattr(batch, name)) for name in self._call_inputs]
        for name, array in zip(self._call_inputs, held, strict=True):
            setattr(call, name, array.ctypes.data)
        for name, pointers in zip(_Step._memory, self._memory, strict=True):
            setattr(call, name, ctypes.addressof(pointers))
        call.next_tokens = tokens.ctypes.data
        call.logits = None if self.logits is None else self.logits.ctypes.data
        if self._library.nuwa_decoder_step(self._decoder, byref(call)):
            raise MemoryError(f"no memory for a step of {rows} rows")
        return tokens


def _library_for(config: ModelConfig, levels: Sequence[int]) -> ctypes.CDLL:
    """The first of these libraries that the machine can run and the model's sizes allow."""
    best = _load(0).nuwa_best_level()
    decoder = config.decoder
    hidden = decoder.ff_multiplier * decoder.width
    for level in levels:
        if level > best:
            continue
        try:
            library = _load(level)
        except UnavailableError:
            continue
        lanes = library.nuwa_lanes()
        fits = (decoder.width % (2 * lanes), hidden % lanes, decoder.width // decoder.heads % lanes)
        if not any(fits):
            return library
    raise UnavailableError(
        f"the native decoder takes models whose heads are a multiple of 4 wide, and as wide as a "
        f"vector of level {' or '.join(map(str, levels))}; this machine runs up to level {best}, "
        f"the model has {decoder.heads} heads in width {decoder.width}"
    )


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
    library = ctypes.CDLL(str(folder / name))
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


def _new_decoder(
    library: ctypes.CDLL, config: ModelConfig, weights: Weights, threads: int
) -> c_void_p:
    decoder = config.decoder
    held: list[npt.NDArray] = []  # until the library has copied them

    def pointer(name: str, *, optional: bool = False) -> int | None:
        found = weights.get(_PREFIX + name, weights.get(f"step.{_PREFIX}{name}"))
        if found is None:
            if optional:
                return None
            raise UnavailableError(
                f"{DECODER_STEP}.onnx names no weights {_PREFIX}{name}; export the checkpoint again"
            )
        held.append(np.ascontiguousarray(found, np.float32))
        return held[-1].ctypes.data

    def block(layer: int) -> _Layer:
        return _Layer(
            *(pointer(f"blocks.{layer}.{w}", optional=w in _OPTIONAL) for w in _BLOCK_WEIGHTS)
        )

    layers = (_Layer * decoder.layers)(*(block(layer) for layer in range(decoder.layers)))
    made = _Weights(
        pointer("embedding.tokens"),
        pointer("embedding.positions.table"),
        *(pointer(name) for name in _HEAD_WEIGHTS),
        layers,
    )
    bounds = np.array(
        [decoder.neighbour_columns(layer) for layer in range(decoder.layers)], np.int32
    )
    grid = decoder.grid
    cross_bias = weights.get(f"{_PREFIX}blocks.0.cross_bias")
    shape = _Shape(
        width=decoder.width,
        layers=decoder.layers,
        heads=decoder.heads,
        codebook=config.image.codebook_size,
        hidden=decoder.ff_multiplier * decoder.width,
        bos=config.bos,
        cross_table=0 if cross_bias is None else cross_bias.shape[1],
        positions=grid.frames + grid.height + grid.width,
        position_starts=(0, grid.frames, grid.frames + grid.height),
        column_bounds=bounds.ctypes.data,
    )
    address = library.nuwa_decoder_new(byref(shape), byref(made), threads)
    if not address:
        raise MemoryError("no memory for the decoder's weights")
    return c_void_p(address)


def _pointers(arrays: list[npt.NDArray]) -> ctypes.Array:
    return (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
