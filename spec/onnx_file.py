"""ONNX files without the onnx package, which the server does not need: reading and widening.

Only those parts of the format are described here that are read or changed, by their field numbers
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); protobuf keeps the rest as it is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INLINE_LIMIT = 1 << 30  # bytes of weights; a file of more than 2 GiB is no valid protobuf
FLOAT, BFLOAT16 = 1, 16  # TensorProto.DataType
EXTERNAL = 1  # TensorProto.DataLocation
_LARGE = 256  # bytes; smaller ones stay: runtimes read shapes and axes when they load a graph

_Field = descriptor_pb2.FieldDescriptorProto
_INT, _LONG, _TEXT = _Field.TYPE_INT32, _Field.TYPE_INT64, _Field.TYPE_STRING
_MESSAGE = _Field.TYPE_MESSAGE
_MESSAGES: dict[str, tuple[tuple[str, int, int, bool, str], ...]] = {
    # name, number, type, repeated, message type
    "Model": (
        ("graph", 7, _MESSAGE, False, "Graph"),
        ("metadata_props", 14, _MESSAGE, True, "Entry"),
        ("functions", 25, _MESSAGE, True, "Function"),
    ),
    "Graph": (
        ("node", 1, _MESSAGE, True, "Node"),
        ("initializer", 5, _MESSAGE, True, "Tensor"),
        ("input", 11, _MESSAGE, True, "Value"),
        ("output", 12, _MESSAGE, True, "Value"),
        ("value_info", 13, _MESSAGE, True, "Value"),
    ),
    "Function": (
        ("node", 7, _MESSAGE, True, "Node"),
        ("value_info", 12, _MESSAGE, True, "Value"),
    ),
    "Node": (
        ("op_type", 4, _TEXT, False, ""),
        ("attribute", 5, _MESSAGE, True, "Attribute"),
    ),
    "Attribute": (
        ("name", 1, _TEXT, False, ""),
        ("i", 3, _LONG, False, ""),
        ("t", 5, _MESSAGE, False, "Tensor"),
        ("g", 6, _MESSAGE, False, "Graph"),
    ),
    "Value": (("type", 2, _MESSAGE, False, "Type"),),
    "Type": (("tensor_type", 1, _MESSAGE, False, "TensorType"),),
    "TensorType": (("elem_type", 1, _INT, False, ""),),
    "Tensor": (
        ("dims", 1, _LONG, True, ""),
        ("data_type", 2, _INT, False, ""),
        ("int32_data", 5, _INT, True, ""),
        ("name", 8, _TEXT, False, ""),
        ("raw_data", 9, _Field.TYPE_BYTES, False, ""),
        ("external_data", 13, _MESSAGE, True, "Entry"),
        ("data_location", 14, _INT, False, ""),
    ),
    "Entry": (
        ("key", 1, _TEXT, False, ""),
        ("value", 2, _TEXT, False, ""),
    ),
}
_PACKED = {"int32_data"}
_PACKAGE = "nuwa.onnx"


def read_model(path: Path) -> Any:
    """The ModelProto of a file; protobuf's DecodeError if it is none, or is cut short."""
    return _model_class().FromString(path.read_bytes())


def external(tensor: Any, folder: Path) -> tuple[Path, int, int]:
    """Where the weights of a tensor of data location EXTERNAL lie: (file, offset, bytes or -1)."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / Path(entries["location"]).name
    return file, int(entries.get("offset", 0)), int(entries.get("length", -1))


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bf16, as its bits, in f32; every number keeps its value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def widen(path: Path, out: Path, inline_limit: int = INLINE_LIMIT) -> None:
    """Writes a graph of bf16 as one of fp32, for runtimes that have no arithmetic in it.

    Every number keeps its value: what rounding between the graph's operators does is lost. Weights
    of other types stay. More than `inline_limit` bytes of weights go to a second file beside it.
    """
    model = read_model(path)
    for graph in (model.graph, *model.functions):
        _widen_graph(graph, path.parent)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > inline_limit:
        _move_weights(model.graph.initializer, out.with_name(f"{out.name}.data"))
    out.write_bytes(model.SerializeToString())


def _widen_graph(graph: Any, folder: Path) -> None:
    """Weights of a graph or a function, and what its nodes and values say of their types."""
    whole = graph.DESCRIPTOR.name == "Graph"
    for tensor in graph.initializer if whole else ():
        _widen_tensor(tensor, folder)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
            if attribute.HasField("t"):
                _widen_tensor(attribute.t, folder)
            if attribute.HasField("g"):
                _widen_graph(attribute.g, folder)
    borders = (*graph.input, *graph.output) if whole else ()
    for value in (*graph.value_info, *borders):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT


def _widen_tensor(tensor: Any, folder: Path) -> None:
    if tensor.data_location == EXTERNAL:
        file, offset, length = external(tensor, folder)
        with file.open("rb") as data:
            data.seek(offset)
            tensor.raw_data = data.read(length)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    if tensor.data_type != BFLOAT16:
        return
    if tensor.raw_data:
        bits = np.frombuffer(tensor.raw_data, "<u2")
    else:
        bits = np.array(tensor.int32_data, np.uint16)
    tensor.raw_data, tensor.data_type = widened(bits).tobytes(), FLOAT
    tensor.ClearField("int32_data")


def _move_weights(tensors: Any, file: Path) -> None:
    with file.open("wb") as data:
        for tensor in tensors:
            if len(tensor.raw_data) < _LARGE:
                continue
            place = {"location": file.name, "offset": data.tell(), "length": len(tensor.raw_data)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(tensor.raw_data)
            tensor.data_location = EXTERNAL
            tensor.ClearField("raw_data")


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
            if name in _PACKED:
                field.options.packed = True
            if target:
                field.type_name = f".{_PACKAGE}.{target}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
