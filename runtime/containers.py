"""What PNG and GIF files say by themselves, without decoding any pixels.

Pillow reads both to wherever they break off, and scales grey values to 8 bits where class ids are
meant. What follows a file's end is not part of it: some programs put a few bytes there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GREY, PALETTE = 0, 3  # colour types of PNG


@dataclass(frozen=True)
class PngSamples:
    """How a PNG states its samples.

    depth: bits of one; palette: u8 [n, 3], None unless samples are its indices; transparent: the
    grey value that stands for no colour, None unless samples are grey and one does.
    """

    depth: int
    palette: npt.NDArray[np.uint8] | None
    transparent: int | None


def is_whole(data: bytes, kind: str | None) -> bool:
    """Whether the end of a PNG or GIF file is there; True for every other kind."""
    if kind == "PNG":
        return any(name == b"IEND" for name, _ in _chunks(data))
    return kind != "GIF" or _has_trailer(data)


def png_samples(data: bytes) -> PngSamples:
    """ValueError if the file's first chunk is not a whole header."""
    chunks = _chunks(data)
    name, header = next(chunks, (b"", b""))
    if name != b"IHDR" or len(header) != 13:
        raise ValueError("the file does not start with a PNG header")
    depth, colour_type = header[8:10]
    palette = np.zeros((0, 3), np.uint8) if colour_type == PALETTE else None
    transparent = None
    for name, body in chunks:
        if name == b"IDAT":
            break
        if name == b"PLTE" and palette is not None:
            palette = np.frombuffer(body, np.uint8, count=len(body) // 3 * 3).reshape(-1, 3)
        if name == b"tRNS" and colour_type == GREY:
            transparent = int.from_bytes(body[:2], "big")
    return PngSamples(depth, palette, transparent)


def after_blocks(data: bytes, position: int) -> int:
    """Of a GIF: where a chain of data blocks that starts at `position` ends, behind its empty one.

    Beyond the end of `data` if the chain is cut off.
    """
    while position < len(data) and data[position]:
        position += 1 + data[position]
    return position + 1


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of each chunk of a PNG that is there as a whole, up to IEND."""
    name, position = b"", 8
    while name != b"IEND" and position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):  # a checksum follows
            return
        yield name, data[position + 8 : end]
        position = end + 4


def _has_trailer(gif: bytes) -> bool:
    position = 13 + _colour_table(gif[10:11])
    while position < len(gif):
        match gif[position]:
            case 0x3B:
                return True
            case 0x21:  # an extension: its label, then blocks
                position = after_blocks(gif, position + 2)
            case 0x2C:  # a picture: its place, flags, colours, the size of a code, then blocks
                colours = _colour_table(gif[position + 9 : position + 10])
                position = after_blocks(gif, position + 11 + colours)
            case _:  # stray bytes, which readers pass over
                position += 1
    return False


def _colour_table(flags: bytes) -> int:
    """Bytes of the table that the flags announce; 0 if the flags themselves are cut off."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
