"""Animated WebP and GIF files, put together frame by frame; one frame at a time is in memory.

Pillow joins neighbouring frames that are equal into one longer frame, so a clip of ten frames could
come back as nine. Here every frame is stored, whole, by itself. Pillow still compresses each one.
Knows nothing of requests; `media.py` is the front door.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from .containers import after_blocks

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]


def webp(frames: Iterable[Pixels], height: int, width: int, milliseconds: int) -> bytes:
    """Lossless animated WebP that loops for ever; each frame lasts `milliseconds`."""
    size = _u24(width - 1) + _u24(height - 1)
    animation_flag, do_not_blend = 0x02, 0x02
    chunks = [
        _chunk(b"VP8X", bytes([animation_flag, 0, 0, 0]) + size),
        _chunk(b"ANIM", struct.pack("<IH", 0xFF000000, 0)),
    ]
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "WEBP", lossless=True)
        header = _u24(0) + _u24(0) + size + _u24(milliseconds) + bytes([do_not_blend])
        chunks.append(_chunk(b"ANMF", header + _image_chunk(buffer.getvalue())))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(frames: Iterable[Pixels], height: int, width: int, milliseconds: int) -> bytes:
    """Animated GIF that loops for ever, with at most 256 colours a frame.

    GIF counts time in hundredths of a second, so `milliseconds` is rounded to tens.
    """
    out = [
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0),
        b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00",
    ]
    centiseconds = max(2, round(milliseconds / 10))  # browsers slow down anything faster than 2
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "GIF", interlace=0)
        palette, size_code, data = _gif_image(buffer.getvalue())
        out.append(b"\x21\xf9\x04" + struct.pack("<BHBB", 0x04, centiseconds, 0, 0))
        out.append(b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0x80 | size_code))
        out.append(palette + data)
    return b"".join([*out, b"\x3b"])


def _u24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _image_chunk(still: bytes) -> bytes:
    """The VP8L chunk of a still WebP file, with its header and padding."""
    position = 12  # past "RIFF", the size and "WEBP"
    while position < len(still):
        name, length = struct.unpack_from("<4sI", still, position)
        end = position + 8 + length + length % 2
        if name == b"VP8L":
            return still[position:end]
        position = end
    raise AssertionError("a lossless WebP file has a VP8L chunk")


def _gif_image(still: bytes) -> tuple[bytes, int, bytes]:
    """Colour table, its size code (2^(code+1) colours), and image data of a one-frame GIF."""
    flags = still[10]
    assert flags & 0x80, "Pillow writes a global colour table"
    size_code = flags & 0x07
    table_end = 13 + 3 * 2 ** (size_code + 1)
    position = table_end
    while still[position] == 0x21:  # skip extensions: a label, then blocks
        position = after_blocks(still, position + 2)
    assert still[position] == 0x2C and not still[position + 9] & 0xC0, "a plain image follows"
    return still[13:table_end], size_code, still[position + 10 : -1]
