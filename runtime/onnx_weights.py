"""Reads the weights out of an ONNX file, without the onnx package: the server does not need it.

Only the part of the format that holds initializers is described here, by its field numbers
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); protobuf skips the rest.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from nuwa.spec.manifest import WEIGHT_ALIASES, BundleError

Weights = dict[str, npt.NDArray]

_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, tuple[tuple[str, int, int, bool, str], ...]] = {
    # name, number, type, repeated, message type
    "Model": (
        ("graph", 7, _Field.TYPE_MESSAGE, False, "Graph"),
        ("metadata_props", 14, _Field.TYPE_MESSAGE, True, "Entry"),
    ),
    "Graph": (("initializer", 5, _Field.TYPE_MESSAGE, True, "Tensor"),),
    "Tensor": (
        ("dims", 1, _Field.TYPE_INT64, True, ""),
        ("data_type", 2, _Field.TYPE_INT32, False, ""),
        ("name", 8, _Field.TYPE_STRING, False, ""),
        ("raw_data", 9, _Field.TYPE_BYTES, False, ""),
        ("external_data", 13, _Field.TYPE_MESSAGE, True, "Entry"),
        ("data_location", 14, _Field.TYPE_INT32, False, ""),
    ),
    "Entry": (
        ("key", 1, _Field.TYPE_STRING, False, ""),
        ("value", 2, _Field.TYPE_STRING, False, ""),
    ),
}
_PACKAGE = "nuwa.runtime.onnx"
_EXTERNAL = 1  # TensorProto.DataLocation
_TYPES = {
    1: np.float32,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    10: np.float16,
}  # TensorProto.DataType


def read_weights(path: Path) -> Weights:
    """The initializers of a graph by name, those of types that this reader knows (`_TYPES`).

    Also by the names of the parameters that export/graphs.py found equal to one of them.

    Arrays may be views of mapped files. BundleError if the file is no ONNX file, or is cut short.
    """
    try:
        model = _model_class().FromString(path.read_bytes())
        named = ((tensor.name, _array(tensor, path.parent)) for tensor in model.graph.initializer)
        weights = {name: array for name, array in named if array is not None}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        aliases = json.loads(metadata.get(WEIGHT_ALIASES, "{}"))
        return weights | {alias: weights[name] for alias, name in aliases.items()}
    except (ValueError, OSError, KeyError, DecodeError) as error:
        raise BundleError(
            f"the weights of {path} cannot be read ({error}); copy or export the bundle again"
        ) from None


def _array(tensor: Any, folder: Path) -> npt.NDArray | None:
    dtype, shape = _TYPES.get(tensor.data_type), tuple(tensor.dims)
    if dtype is None:
        return None
    if tensor.data_location != _EXTERNAL:
        if not tensor.raw_data and np.prod(shape, dtype=int):
            return None  # small constants, kept as numbers
        return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, name = int(entries.get("offset", 0)), Path(entries["location"]).name
    return np.memmap(folder / name, dtype, "r", offset, shape)


@cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto2"
    )
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated, target in fields:
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, type=kind, label=label)
            if target:
                field.type_name = f".{_PACKAGE}.{target}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
