"""Reads the weights out of an ONNX file, without the onnx package: the server does not need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from nuwa.spec.manifest import WEIGHT_ALIASES, WEIGHT_TRANSPOSES, BundleError
from nuwa.spec.onnx_file import BFLOAT16, EXTERNAL, FLOAT, external, read_model, widened

from .errors import UnavailableError

Weights = dict[str, npt.NDArray]

BF16 = np.dtype(np.uint16)  # its bits: numpy has none, and nothing else in our graphs is this

_TYPES: dict[int, npt.DTypeLike] = {
    FLOAT: np.float32,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    10: np.float16,
    BFLOAT16: BF16,
}  # TensorProto.DataType


def read_weights(path: Path) -> Weights:
    """The initializers of a graph by name, those of types that this reader knows (`_TYPES`).

    Also by the names of the parameters that export/graphs.py found equal to one of them; a norm's
    are [C, 1, 1] then.

    Arrays may be views of mapped files. BundleError if the file is no ONNX file, or is cut short.
    """
    try:
        model = read_model(path)
        named = ((tensor.name, _array(tensor, path.parent)) for tensor in model.graph.initializer)
        weights = {name: array for name, array in named if array is not None}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        aliases = json.loads(metadata.get(WEIGHT_ALIASES, "{}"))
        transposes = json.loads(metadata.get(WEIGHT_TRANSPOSES, "{}"))
        others = {alias: weights[name] for alias, name in aliases.items()}
        turned = {alias: weights[name].T for alias, name in transposes.items()}
        return weights | others | turned
    except (ValueError, OSError, KeyError, DecodeError) as error:
        raise BundleError(
            f"the weights of {path} cannot be read ({error}); copy or export the bundle again"
        ) from None


def _array(tensor: Any, folder: Path) -> npt.NDArray | None:
    dtype, shape = _TYPES.get(tensor.data_type), tuple(tensor.dims)
    if dtype is None:
        return None
    if tensor.data_location != EXTERNAL:
        if not tensor.raw_data and np.prod(shape, dtype=int):
            return None  # small constants, kept as numbers
        return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
    file, offset, _ = external(tensor, folder)
    return np.memmap(file, dtype, "r", offset, shape)


def floats(array: npt.NDArray) -> npt.NDArray[np.float32]:
    """Weights of any type in f32, dense."""
    wide = widened(np.ascontiguousarray(array)) if array.dtype == BF16 else array
    return np.ascontiguousarray(wide, np.float32)


def fitting(
    array: npt.NDArray | None, graph: str, name: str, shape: tuple[int, ...]
) -> npt.NDArray:
    """Weights that were found, or UnavailableError if there are none, or none of this shape."""
    if array is None or array.shape != shape:
        has = "no weights" if array is None else f"weights of shape {array.shape} as"
        raise UnavailableError(
            f"{graph}.onnx has {has} {name}, where {shape} are needed; export the checkpoint again"
        )
    return array
