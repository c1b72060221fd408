"""The native decoder's libraries as Python sees them: structures, loading, the product alone.

Kept in step with native/decoder_abi.h by hand. Knows no bundle and no backend.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_void_p
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UnavailableError
from ..onnx_weights import BF16
from .base import Float, Lane, Rows

_ABI_VERSION = 5  # kAbiVersion of native/decoder_abi.h
LEVELS = (4, 3, 0)  # x86-64 levels of the libraries, best first; 0 runs anywhere
BLOCK_WEIGHTS = (
    *("self_norm.weight", "self_norm.bias", "self_qkv.weight"),
    *("self_out.weight", "self_out.bias"),
    *("cross_norm.weight", "cross_norm.bias", "cross_q.weight"),
    *("cross_out.weight", "cross_out.bias"),
    *("ff_norm.weight", "ff_norm.bias", "ff_in.weight", "ff_in.bias"),
    *("ff_out.weight", "ff_out.bias"),
    *("bias", "cross_bias"),
)
HEAD_WEIGHTS = ("head_norm.weight", "head_norm.bias", "head.weight", "head.bias")
_LINEAR = ("self_qkv", "self_out", "cross_q", "cross_out", "ff_in", "ff_out", "head")
MATRICES = tuple(f"{name}.weight" for name in _LINEAR)  # those that int8 is for
MATRIX_TYPES = [np.dtype(each) for each in (np.float32, np.float16, BF16, np.int8)]  # NuwaType
ROWS = tuple(field.name for field in fields(Rows))


class AbiShape(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("width", "layers", "heads", "codebook", "hidden", "bos")),
        *((name, c_int32) for name in ("cross_table", "positions", "rows")),
        ("position_starts", c_int32 * 3),
        ("column_bounds", c_void_p),
    ]


class AbiMatrix(Structure):
    """Of f32, f16 or bf16 [O, I], or int8 [I, O] with its scale f32 [O]."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("type", c_int32)]

    @classmethod
    def of(cls, matrix: npt.NDArray, scale: Float | None = None) -> AbiMatrix:
        """As long as the arrays are there."""
        address = None if scale is None else scale.ctypes.data
        return cls(matrix.ctypes.data, address, MATRIX_TYPES.index(matrix.dtype))


def _weight_fields(names: Iterable[str]) -> list[tuple[str, type]]:
    return [(name.replace(".", "_"), AbiMatrix if name in MATRICES else c_void_p) for name in names]


class AbiLayer(Structure):
    _fields_ = _weight_fields(BLOCK_WEIGHTS)


class AbiWeights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "positions")),
        *_weight_fields(HEAD_WEIGHTS),
        ("layers", POINTER(AbiLayer)),
    ]


class AbiLane(Structure):
    _fields_ = [(field.name, c_int32) for field in fields(Lane)]


class AbiStream(Structure):
    _fields_ = [
        *((name, c_void_p) for name in (*ROWS, "tokens")),
        ("lanes", AbiLane * 2),
        *((name, c_int32) for name in ("lane_count", "top_k")),
        *((name, c_float) for name in ("temperature", "top_p", "guidance")),
    ]


class AbiPart(Structure):
    _fields_ = [
        ("stream", POINTER(AbiStream)),
        *((name, c_int32) for name in ("first", "count", "finite")),
    ]


class AbiStep(Structure):
    MEMORY = ("key_caches", "value_caches", "cross_keys", "cross_values")
    _fields_ = [
        ("parts", POINTER(AbiPart)),
        *((name, c_void_p) for name in ("seconds", "threads", "stop")),
        *((name, c_int32) for name in ("call_count", "part_count", "done")),
        *((name, c_int32) for name in ("neighbour_columns", "visual_columns")),
        *((name, c_int32) for name in ("cache_entries", "condition_entries")),
        *((name, c_void_p) for name in (*MEMORY, "logits")),
        ("most_seconds", c_double),
    ]


class AbiEncoderShape(Structure):
    """This and the next three: of native/encoder_abi.h."""

    _fields_ = [
        *((name, c_int32) for name in ("width", "blocks", "heads", "hidden", "gated", "out")),
        *((name, c_int32) for name in ("layers", "ids", "positions", "columns")),
        ("position_starts", c_int32 * 3),
    ]


class AbiEncoderBlock(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm_weight", "norm_bias")),
        *(("qkv", AbiMatrix), ("qkv_bias", c_void_p)),
        *(("attended", AbiMatrix), ("attended_bias", c_void_p)),
        *((name, c_void_p) for name in ("ff_norm_weight", "ff_norm_bias")),
        *(("ff_in", AbiMatrix), ("ff_in_bias", c_void_p)),
        *(("ff_out", AbiMatrix), ("ff_out_bias", c_void_p)),
        ("bias", c_void_p),
    ]


class AbiEncoderWeights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("token_table", "positions")),
        ("blocks", POINTER(AbiEncoderBlock)),
        *((name, c_void_p) for name in ("norm_weight", "norm_bias")),
        *(("project", AbiMatrix), ("project_bias", c_void_p)),
        ("memory", POINTER(AbiMatrix)),
    ]


class AbiEncoding(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "coordinates", "neighbours", "entries")),
        *((name, c_int32) for name in ("rows", "threads")),
        *((name, c_void_p) for name in ("keys", "values")),
    ]


class AbiOp(Structure):
    """Of native/convnet_abi.h."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "source", "to", "keys", "values", "side")),
        *((name, c_int32) for name in ("inputs", "outputs", "kernel", "stride", "adds", "silu")),
        *((name, c_void_p) for name in ("weight", "bias")),
    ]


@cache
def load(level: int) -> ctypes.CDLL:
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
    version = library.nuwa_abi_version()  # first: others may not be there in another version
    if version != _ABI_VERSION:
        raise UnavailableError(
            f"{folder / name} is of another version ({version}, this is {_ABI_VERSION}); install "
            f"nuwa-runtime again"
        )
    library.nuwa_decoder_new.restype = c_void_p
    library.nuwa_decoder_new.argtypes = [POINTER(AbiShape), POINTER(AbiWeights), c_int32]
    library.nuwa_decoder_step.argtypes = [c_void_p, POINTER(AbiStep)]
    library.nuwa_decoder_free.argtypes = [c_void_p]
    sizes = [c_int32] * 3
    library.nuwa_multiply.argtypes = [c_void_p, *sizes, POINTER(AbiMatrix), c_void_p]
    library.nuwa_decoder_free.restype = None
    library.nuwa_team_new.restype = c_void_p
    library.nuwa_team_new.argtypes = [c_int32]
    library.nuwa_team_free.restype = None
    library.nuwa_team_free.argtypes = [c_void_p]
    library.nuwa_encoder_new.restype = c_void_p
    library.nuwa_encoder_new.argtypes = [
        POINTER(AbiEncoderShape),
        POINTER(AbiEncoderWeights),
        c_void_p,
    ]
    library.nuwa_encoder_run.argtypes = [c_void_p, POINTER(AbiEncoding)]
    library.nuwa_encoder_free.restype = None
    library.nuwa_encoder_free.argtypes = [c_void_p]
    library.nuwa_convnet_new.restype = c_void_p
    library.nuwa_convnet_new.argtypes = [POINTER(AbiOp), c_int32, c_void_p, c_int32]
    library.nuwa_convnet_run.argtypes = [c_void_p, c_void_p, c_int32, c_void_p]
    library.nuwa_convnet_free.argtypes = [c_void_p]
    library.nuwa_convnet_free.restype = None
    return library


def multiply(level: int, rows: Float, matrix: npt.NDArray, scale: Float | None = None) -> Float:
    """rows f32 [T, I] times a matrix, by the library of a level: f32 [T, O].

    The matrix is f32, f16 or bf16 (BF16) [O, I] or, with its scale f32 [O], int8 [I, O]; I is a
    multiple of 16.
    """
    library, rows = load(level), np.ascontiguousarray(rows, np.float32)
    matrix = np.ascontiguousarray(matrix)
    outputs = matrix.shape[0 if scale is None else 1]
    made = np.empty((len(rows), outputs), np.float32)
    told = AbiMatrix.of(matrix, scale)
    addresses = (c_void_p(array.ctypes.data) for array in (rows, made))
    given, to = addresses
    if library.nuwa_multiply(given, len(rows), rows.shape[1], outputs, byref(told), to):
        raise MemoryError(f"no memory for a product of {len(rows)} rows")
    return made
