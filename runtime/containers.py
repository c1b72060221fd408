"""PNG, GIF, JPEG and WebP files, walked through piece by piece without decoding any pixels.

Pillow looks at sizes too late: on the way to the pixels it unpacks texts, joins comments, parses
EXIF and fills canvases that a later frame states, and all of that before it can be asked how large
a picture is. So files are walked here first, in time linear in their length, and what is handed on
holds nothing but pixels. What follows a file's end is not part of it: some programs put a few
bytes there.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GREY, PALETTE = 0, 3  # colour types of PNG
MOST_SCANS = 100  # of a JPEG, each of which goes over the whole picture; programs write about ten

_OF_PNG = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"IDAT", b"fdAT", b"IEND")
_OF_GIF = re.compile(rb"[!,;]")  # an extension, a picture, the end
_GIF_EXTENSION, _GIF_END, _GRAPHIC_CONTROL = 0x21, 0x3B, b"\xf9"
# Of a JPEG: what starts a segment, and the end. All else may lie within a scan, some of it only
# because libjpeg, where it waits for a restart, passes over markers that mean nothing.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_SCAN, _END, _EXIF_OR_XMP = 0xDA, 0xD9, 0xE1
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xDE}
_NO_PIXELS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # comments, and what programs add; not Adobe's
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


@dataclass(frozen=True)
class Container:
    """What a file says of its pixels, and the file without all that is none.

    kind: as Pillow calls it; frames: as stated, all of them; height, width: before a JPEG is turned
    as its orientation, EXIF's number, asks for.
    """

    kind: str
    frames: int
    height: int
    width: int
    data: bytes
    orientation: int = 1


@dataclass(frozen=True)
class PngSamples:
    """How a PNG states its samples.

    depth: bits of one; palette: u8 [n, 3], None unless samples are its indices; transparent: the
    grey value that stands for no colour, None unless samples are grey and one does.
    """

    depth: int
    palette: npt.NDArray[np.uint8] | None
    transparent: int | None


def read(data: bytes) -> Container:
    """ValueError, whose message goes on from the name of the file, if it is none of the kinds, has
    no end, no size, frames outside its canvas, or more pieces than programs make of so many bytes.
    """
    for start, walk in (
        (b"\x89PNG\r\n\x1a\n", _png),
        (b"GIF87a", _gif),
        (b"GIF89a", _gif),
        (b"\xff\xd8\xff", _jpeg),
        (b"RIFF", _webp),
    ):
        if data.startswith(start):
            return walk(data)
    raise _unknown()


def png_samples(data: bytes) -> PngSamples:
    """ValueError if the file's first chunk is not a whole header."""
    chunks = _chunks(data)
    depth, colour_type = _png_header(data, next(chunks, None))[2:]
    palette = np.zeros((0, 3), np.uint8) if colour_type == PALETTE else None
    transparent = None
    for name, start, end in chunks:
        if name == b"IDAT":
            break
        if name == b"PLTE" and palette is not None:
            count = (end - start) // 3 * 3
            palette = np.frombuffer(data, np.uint8, count, start).reshape(-1, 3)
        if name == b"tRNS" and colour_type == GREY:
            transparent = int.from_bytes(data[start : min(end, start + 2)], "big")
    return PngSamples(depth, palette, transparent)


def after_blocks(data: bytes, position: int, each: Callable[[], None] = lambda: None) -> int:
    """Of a GIF: where a chain of data blocks that starts at `position` ends, behind its empty one.

    Beyond the end of `data` if the chain is cut off. Calls `each` for every block.
    """
    while position < len(data) and data[position]:
        position += 1 + data[position]
        each()
    return position + 1


class _Pieces:
    """Counts chunks, blocks and segments, each of which costs Pillow time and memory of its own.

    Programs write pieces of hundreds of bytes and more; only tiny animations have shorter ones.
    """

    def __init__(self, data: bytes) -> None:
        self.most = self.left = 4096 + len(data) // 64

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"is in more than {self.most} pieces, far more than programs write")


def _png(data: bytes) -> Container:
    chunks, pieces, view = _chunks(data), _Pieces(data), memoryview(data)
    first = next(chunks, None)
    width, height, _, _ = _png_header(data, first)
    kept = io.BytesIO()
    kept.write(view[:33])  # up to the end of the header
    animated, shown_first, pixels = 0, False, False
    for name, start, end in chunks:
        pieces.count()
        if name not in _OF_PNG:
            continue
        if name == b"IHDR":  # which would change the size behind everybody's back
            raise _damaged("it has a second header")
        if name == b"acTL":
            if pixels:
                continue  # too late to count
            animated = _png_animation(data[start:end], animated)
        pixels |= name == b"IDAT"
        shown_first |= name == b"fcTL" and not pixels
        kept.write(view[start - 8 : end + 4])
        if name == b"IEND":
            frames = animated + (not shown_first) if animated else 1
            return Container("PNG", frames, height, width, kept.getvalue())
    raise _cut_off("PNG")


def _png_header(data: bytes, first: tuple[bytes, int, int] | None) -> tuple[int, int, int, int]:
    """(width, height, depth, colour type) of the first chunk."""
    if first != (b"IHDR", 16, 29):
        raise _damaged("it does not start with a PNG header")
    return struct.unpack_from(">IIBB", data, 16)


def _png_animation(body: bytes, before: int) -> int:
    frames = int.from_bytes(body[:4], "big")
    if before or len(body) < 8 or not 1 <= frames <= 2**31:
        raise _damaged("it does not say how many frames it has")
    return frames


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name of each chunk of a PNG that is there as a whole, up to IEND, and where its body is."""
    name, position = b"", 8
    while name != b"IEND" and position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):  # a checksum follows
            return
        yield name, position + 8, end
        position = end + 4


def _gif(data: bytes) -> Container:
    if len(data) < 13:
        raise _cut_off("GIF")
    pieces, view, kept = _Pieces(data), memoryview(data), io.BytesIO()
    width, height = struct.unpack_from("<HH", data, 6)
    position, frames = 13 + _colour_table(data[10]), 0
    kept.write(view[:position])
    while found := _OF_GIF.search(data, position):  # readers pass over stray bytes
        start = found.start()
        if data[start] == _GIF_END:
            break
        pieces.count()
        if data[start] == _GIF_EXTENSION:  # its label, then blocks
            position = after_blocks(data, start + 2, pieces.count)
            if data[start + 1 : start + 2] != _GRAPHIC_CONTROL:
                continue
        else:  # a picture: its place, flags, colours, the size of a code, then blocks
            if len(data) < start + 10:
                raise _cut_off("GIF")
            x, y, across, down, flags = struct.unpack_from("<HHHHB", data, start + 1)
            position = after_blocks(data, start + 11 + _colour_table(flags), pieces.count)
            frames += 1
            if frames == 1:  # which programs show as a whole, whatever the size of the canvas
                width, height = max(width, x + across), max(height, y + down)
            if x + across > width or y + down > height:
                raise _damaged(f"frame {frames} is not inside its {width} x {height} pixels")
        kept.write(view[start:position])
    else:
        raise _cut_off("GIF")
    if not frames:
        raise _damaged("there is no picture in it")
    kept.write(view[start : start + 1])
    return Container("GIF", frames, height, width, kept.getvalue())


def _colour_table(flags: int) -> int:
    """Bytes of the table that the flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _jpeg(data: bytes) -> Container:
    """Up to the first scan, segments that are not the decoder's are left out; behind that, libjpeg
    skips them by itself.
    """
    view, kept, scans = memoryview(data), io.BytesIO(), 0
    kept.write(view[:2])
    size: tuple[int, int] | None = None
    exif, xmp = None, b""
    for marker, start, body, end in _segments(data):
        if marker == _SCAN:
            if not scans:
                kept.write(view[start:])
            scans += 1
            if scans > MOST_SCANS:
                raise ValueError(f"has more than {MOST_SCANS} scans, far more than programs write")
        if scans:
            continue
        if marker in _FRAME_HEADERS:
            size = _frame_header(data[body:end], size)
        if marker not in _NO_PIXELS:
            kept.write(view[start:end])
        elif marker == _EXIF_OR_XMP:
            content = data[body:end]
            if content.startswith(b"Exif\0\0") and exif is None:
                exif = content[6:]
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = content
    if not scans or size is None:
        raise _damaged("there is no picture in it")
    return Container("JPEG", 1, *size, kept.getvalue(), _orientation(exif, xmp))


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker of each segment of a JPEG, where it, its body and its end are; stray bytes, fill bytes
    and what is in scans are passed over, as libjpeg does.
    """
    pieces, end = _Pieces(data), 2
    while found := _MARKER.search(data, end):
        start = found.start()
        body = start + 4
        end = max(body, start + 2 + int.from_bytes(data[start + 2 : body], "big"))
        if data[start + 1] == _END or end > len(data):
            return
        pieces.count()
        yield data[start + 1], start, body, end


def _frame_header(body: bytes, before: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width)."""
    if before is not None or len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise _damaged("its size is not clear")
    height, width = struct.unpack_from(">HH", body, 1)
    return height, width


def _orientation(exif: bytes | None, xmp: bytes) -> int:
    """1 unless EXIF says otherwise or, where that says nothing, XMP."""
    stated = None if exif is None else _exif_orientation(exif)
    if stated is None and (found := _XMP_ORIENTATION.search(xmp)):
        return int(found[1])
    return 1 if stated is None else stated


def _exif_orientation(exif: bytes) -> int | None:
    """Read here because Pillow, to find one number, unpacks every tag and warns of each."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order = "<" if exif[:1] == b"I" else ">"
    (start,) = struct.unpack_from(order + "I", exif.ljust(8, b"\0"), 4)
    (count,) = struct.unpack(order + "H", exif[start : start + 2].ljust(2, b"\0"))
    first = start + 2
    for entry in range(first, min(first + 12 * count, len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", exif, entry)
        if tag == 0x0112 and kind in (3, 4) and values == 1:
            return struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, entry + 8)[0]
    return None


def _webp(data: bytes) -> Container:
    """As it is: libwebp unpacks nothing but frames, and none that is not inside its canvas."""
    if data[8:12] != b"WEBP":
        raise _unknown()
    head = data[12:30].ljust(18, b"\0")
    match head[:4]:
        case b"VP8X":
            width = 1 + int.from_bytes(head[12:15], "little")
            height = 1 + int.from_bytes(head[15:18], "little")
        case b"VP8L":
            bits = int.from_bytes(head[9:13], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = (each & 0x3FFF for each in struct.unpack_from("<HH", head, 14))
        case _:
            raise _unknown()
    animated = head[:4] == b"VP8X" and head[8] & 2
    frames = _webp_frames(data) if animated else 1
    return Container("WEBP", frames, height, width, data)


def _webp_frames(data: bytes) -> int:
    pieces, position, frames = _Pieces(data), 12, 0
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position + 8 <= end:
        pieces.count()
        name, length = struct.unpack_from("<4sI", data, position)
        frames += name == b"ANMF"
        position += 8 + length + length % 2
    return frames


def _unknown() -> ValueError:
    return ValueError("is not a PNG, WEBP, GIF, JPEG file")


def _cut_off(kind: str) -> ValueError:
    return ValueError(f"is cut off: the end of a {kind} file is missing")


def _damaged(how: str) -> ValueError:
    return ValueError(f"is damaged or cut off: {how}")
