"""Tensors of the Open Inference Protocol as bytes and arrays, both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa.inference import grpc_service_pb2 as pb

from ..errors import FieldError

# What this server takes. Samples of pictures are bytes; texts and files are BYTES.
KINDS = {
    "UINT8": ("uint_contents", np.dtype(np.uint8)),
    "BOOL": ("bool_contents", np.dtype(np.bool_)),
    "BYTES": ("bytes_contents", None),
}
MOST_DIMENSIONS = 8
LENGTH_BYTES = 4  # before each element of a BYTES tensor that comes raw


@dataclass(frozen=True)
class Tensor:
    """shape and the elements: samples as they lie in memory, or the elements of BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    elements: list[bytes]


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Tensor]:
    """All inputs by name. FieldError for tensors that contradict themselves or each other."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise FieldError(
            "raw_input_contents",
            f"there are {len(raw)} raw contents for {len(request.inputs)} inputs; give one for "
            "each input, or none",
        )
    found: dict[str, Tensor] = {}
    for index, given in enumerate(request.inputs):
        field = f"inputs.{given.name}" if given.name else f"inputs[{index}]"
        if given.name in found:
            raise FieldError(field, f"input {given.name!r} is given twice")
        if given.parameters:
            name = next(iter(given.parameters))
            raise FieldError(
                f"{field}.parameters.{name}", f"inputs take no parameters; {name!r} is one"
            )
        found[given.name] = _read(given, field, raw[index] if raw else None)
    return found


def _read(given: Any, field: str, raw: bytes | None) -> Tensor:
    if given.datatype not in KINDS:
        raise FieldError(
            field, f"datatype {given.datatype!r} is not one of {', '.join(KINDS)}; see the metadata"
        )
    shape = tuple(given.shape)
    if len(shape) > MOST_DIMENSIONS or any(size < 1 for size in shape):
        raise FieldError(
            field, f"shape {list(shape)[:MOST_DIMENSIONS]} is not of 1 or more everywhere"
        )
    count = math.prod(shape)
    contents, dtype = KINDS[given.datatype]
    typed = [name.name for name, _ in given.contents.ListFields()]
    if typed and raw is not None:
        raise FieldError(field, "the input has both contents and raw contents")
    if typed and typed != [contents]:
        raise FieldError(field, f"contents of {given.datatype} are {contents}, not {typed[0]}")
    data = b""
    elements: list[bytes] = []
    if dtype is None:
        elements = list(given.contents.bytes_contents) if raw is None else _elements(raw, field)
        have = len(elements)
    else:
        data = _samples(given.contents, contents, dtype, field) if raw is None else raw
        have = len(data)
    if have != count:
        raise FieldError(
            field, f"the input has {have} elements; its shape {list(shape)} says {count}"
        )
    return Tensor(given.name, given.datatype, shape, data, elements)


def _samples(contents: Any, name: str, dtype: np.dtype, field: str) -> bytes:
    values = np.array(getattr(contents, name), np.int64)
    if values.size and values.max() > np.iinfo(np.uint8).max:
        raise FieldError(field, f"the input has the value {values.max()}, more than 255")
    return values.astype(dtype).tobytes()


def _elements(raw: bytes, field: str) -> list[bytes]:
    elements, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + LENGTH_BYTES], "little")
        at += LENGTH_BYTES + length
        if at > len(raw):
            raise FieldError(
                field,
                "the raw BYTES end within an element; each is its length as four bytes, "
                "little end first, and then so many bytes",
            )
        elements.append(raw[at - length : at])
    return elements


def add_output(
    response: pb.ModelInferResponse, name: str, values: npt.NDArray[Any], **parameters: Any
) -> None:
    """Appends an array, u8 or i32, as raw contents."""
    datatype = {"uint8": "UINT8", "int32": "INT32"}[values.dtype.name]
    output = response.outputs.add(name=name, datatype=datatype, shape=values.shape)
    set_parameters(output.parameters, parameters)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    response.raw_output_contents.append(little.tobytes())


def set_parameters(parameters: Any, values: dict[str, Any]) -> None:
    """Fills a map of InferParameter: bool, int, float or str."""
    for name, value in values.items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(parameters[name], kinds[type(value)], value)
