"""Requests as bytes, before they are messages: refused where parsing would take too much.

gRPC would parse a request in the one thread that all its calls share, before anybody could look at
it. A few megabytes of empty submessages become forty times as much, in a time in which nothing else
runs. So the server takes bytes, and each call's own thread looks at them here. Where the fields
are, see protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from .errors import FieldError

MOST_FIELDS = 10_000  # in all, those of submessages included; a mask of 256 boxes has 1300
MOST_PACKED = 2**20  # bytes of numbers one after the other, in all; they take eight times as much
VARINT_BYTES = 10  # at most: 64 bits
VARINT, FIXED64, DELIMITED, GROUP, GROUP_END, FIXED32 = range(6)


def reader(deserialize: Callable[[bytes], Message]) -> Callable[[bytes], Message]:
    """What gives a message for its bytes: `deserialize` of a generated class, after a look at them.

    FieldError, of no field, for what is none, and for what has too much in it.
    """
    descriptor = deserialize.__self__.DESCRIPTOR  # type: ignore[attr-defined]

    def read(data: bytes) -> Message:
        if len(data) > 2 * MOST_FIELDS:  # or there is no room for as many
            _Walk().over(data, 0, len(data), descriptor)
        try:
            return deserialize(data)
        except DecodeError:
            raise FieldError(
                "", "the request is not a valid message (text must be UTF-8)"
            ) from None

    return read


class _Walk:
    """Counts what one request has, and stops at too much.

    What is no message is no error here; who parses it will find out.
    """

    def __init__(self) -> None:
        self.fields = self.packed = 0

    def over(self, data: bytes, at: int, end: int, descriptor: Any) -> None:
        """data[at:end] is a message of that kind."""
        while at < end:
            self.fields += 1
            if self.fields > MOST_FIELDS:
                raise FieldError("", f"the request has more than {MOST_FIELDS} fields")
            tag, at = _varint(data, at, end)
            kind = tag & 7
            if kind == VARINT:
                _, at = _varint(data, at, end)
            elif kind == DELIMITED:
                length, at = _varint(data, at, end)
                field = descriptor.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    self.over(data, at, min(at + length, end), field.message_type)
                elif field is not None and _numbers(field):
                    self._pack(length, field.full_name)
                at += length
            elif kind in (FIXED64, FIXED32):
                at += 8 if kind == FIXED64 else 4
            elif kind not in (GROUP, GROUP_END):
                break

    def _pack(self, length: int, name: str) -> None:
        """A field may come in pieces, which are put together: so all of them are counted."""
        self.packed += length
        if self.packed > MOST_PACKED:
            raise FieldError(
                "",
                f"{name} has more than {MOST_PACKED} bytes of numbers, or the request has; send "
                "them raw, as bytes",
            )


def _numbers(field: Any) -> bool:
    return field.is_repeated and field.type not in (field.TYPE_STRING, field.TYPE_BYTES)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(value, where it ends): the value so far, and `end`, if it is cut off or goes on for longer
    than any number does, which is no message.
    """
    value = 0
    for position in range(at, min(at + VARINT_BYTES, end)):
        byte = data[position]
        value |= (byte & 127) << 7 * (position - at)
        if byte < 128:
            return value, position + 1
    return value, end
