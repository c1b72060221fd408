"""Files as hostile as they can be made by hand, and valid ones, whose pixels nothing may change."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from nuwa.runtime import containers, media
from nuwa.runtime.media import Limits, MediaError

SIDE = 64
MIB = 2**20
RANDOM = np.random.default_rng(0)
PICTURE = Image.fromarray(RANDOM.integers(0, 256, (23, 31, 3), np.uint8))


@pytest.fixture
def unopened(monkeypatch):
    """What is refused now is refused before Pillow sees it."""
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the file was opened"))


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + checksum


def header(width: int, height: int, colour_type: int = 2, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, interlaced))


ROWS = b"".join(b"\0" + RANDOM.bytes(3 * SIDE) for _ in range(SIDE))
PIXELS = chunk(b"IDAT", zlib.compress(ROWS))


def png(before: bytes = b"", pixels: bytes = PIXELS, after: bytes = b"") -> bytes:
    chunks = header(SIDE, SIDE) + before + pixels + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def frame_control(number: int, width: int, height: int, x: int = 0, disposal: int = 0) -> bytes:
    fields = (number, width, height, x, 0, 1, 10, disposal, 0)
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", *fields))


def screen(width: int = SIDE, height: int = SIDE) -> bytes:
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 9, 0, 99, 0, 200])
    )


def control(disposal: int) -> bytes:
    return b"!\xf9\4" + bytes([disposal << 2, 1, 0, 0, 0])


def lzw() -> bytes:
    """The size of a code and the blocks of a GIF's picture, SIDE x SIDE, of two colours."""
    image = Image.fromarray(RANDOM.integers(0, 2, (SIDE, SIDE), np.uint8), "P")
    image.putpalette([0, 9, 0, 99, 0, 200])
    data = file_of(image, "GIF", optimize=False, interlace=0)
    place = data.index(b"," + struct.pack("<HHHHB", 0, 0, SIDE, SIDE, 0))
    return data[place + 10 : -1]


LZW = lzw()


def drawn(x: int, y: int, width: int = SIDE, height: int = SIDE, data: bytes = LZW) -> bytes:
    return b"," + struct.pack("<HHHHB", x, y, width, height, 0) + data


def gif(*pieces: bytes) -> bytes:
    return screen() + b"".join(pieces) + b";"


JPEG = file_of(PICTURE, "JPEG")


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*more: bytes) -> bytes:
    return JPEG[:2] + b"".join(more) + JPEG[2:]


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *([orientation, 0][: 5 - kind]))
    entries = struct.pack(order + "HHI", 0x0100, 4, 1) + bytes(4)
    entries += struct.pack(order + "HHI", 0x0112, kind, 1) + value
    tags = struct.pack(order + "IH", 8, 2) + entries + bytes(4)
    return segment(0xE1, b"Exif\0\0" + start + tags)


def xmp(text: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text)


def webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp(width: int, height: int, *more: bytes) -> bytes:
    """An animated one that states its size."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = webp_chunk(b"VP8X", b"\2\0\0\0" + size) + webp_chunk(b"ANIM", bytes(6))
    body = b"WEBP" + chunks + b"".join(more)
    return b"RIFF" + struct.pack("<I", len(body)) + body


# Valid files.


def moving(mode: str) -> list[Image.Image]:
    """Five frames that differ in parts."""
    clear = 0 if mode == "RGBA" else 255
    frames = []
    for index in range(5):
        image = Image.new("RGBA", (40, 30), (10, 20, 30, clear))
        image.paste((200, index * 40, 99, 255), (3 + 5 * index, 4, 12 + 5 * index, 14))
        image.paste((0, 250, 20 * index, 130 if mode == "RGBA" else 255), (20, 3 * index, 30, 25))
        frames.append(image.convert(mode))
    return frames


def interlaced(colour_type: int, channels: int, more: bytes = b"") -> bytes:
    """A PNG of 13 x 11 as Adam7 scans it."""
    pixels = RANDOM.integers(0, 5, (11, 13, channels), np.uint8)
    rows = b""
    for x, y, right, down in (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ):
        rows += b"".join(b"\0" + row[x::right].tobytes() for row in pixels[y::down])
    body = header(13, 11, colour_type, 1) + more + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def valid_files() -> dict[str, bytes]:
    alpha = Image.fromarray(RANDOM.integers(0, 256, (23, 31), np.uint8))
    with_alpha = PICTURE.copy()
    with_alpha.putalpha(alpha)
    said = PngImagePlugin.PngInfo()
    said.add_itxt("k", "ü" * 500, zip=True)
    said.add(b"aaTr", bytes(99), after_idat=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = PICTURE.quantize(17)
    tags = chunk(b"PLTE", RANDOM.bytes(15)) + chunk(b"tRNS", b"\0\x80")
    files = {
        "png of few bits": file_of(PICTURE.quantize(4), "PNG", bits=2),
        "png of one bit": file_of(alpha.convert("1"), "PNG"),
        "png with tRNS of a palette": file_of(
            palette, "PNG", transparency=bytes(range(0, 170, 10))
        ),
        "png with one clear colour": file_of(palette, "PNG", transparency=3),
        "grey png with tRNS": file_of(alpha, "PNG", transparency=7),
        "rgb png with tRNS": file_of(PICTURE, "PNG", transparency=PICTURE.getpixel((0, 0))),
        "grey png with alpha": file_of(with_alpha.convert("LA"), "PNG"),
        "png with alpha": file_of(with_alpha, "PNG"),
        "png that says much": file_of(
            PICTURE, "PNG", pnginfo=said, exif=turned, icc_profile=b"i" * 400, dpi=(72, 72)
        ),
        "png in many pieces": png(
            b"",
            b"".join(
                chunk(b"IDAT", part) for part in (PIXELS[8:9], b"", PIXELS[9:70], PIXELS[70:-4])
            ),
        ),
        "interlaced palette png": interlaced(3, 1, tags),
        "gif of a larger first frame": screen(10, 0) + drawn(0, 0) + b";",
        "gif of parts": screen(70, 80)
        + (control(2) + drawn(3, 4) + control(3) + drawn(5, 6) + control(1) + drawn(6, 16))
        + b";more",
        "gif with stray bytes": screen() + bytes(9) + drawn(0, 0) + b"\0\7" + drawn(0, 0) + b"\0;",
        "progressive jpeg": file_of(
            PICTURE, "JPEG", progressive=True, comment=b"c" * 99, exif=turned
        ),
        "jpeg with a profile": file_of(PICTURE, "JPEG", icc_profile=b"i" * 70_000, dpi=(72, 72)),
        "rgb jpeg": file_of(PICTURE, "JPEG", keep_rgb=True),
        "restarted jpeg": file_of(PICTURE, "JPEG", restart_marker_blocks=1),
        "padded jpeg": jpeg(b"\xff" * 50),
        "jpeg with stray bytes": jpeg(segment(0xFE, b"c"), bytes(50), b"\xff\0"),
        "jpeg with trailing pictures": JPEG + b"\xff\xd8\xff\xda" * 200,
        "jpeg turned by xmp": jpeg(xmp(b'<x tiff:Orientation="8">')),
        "jpeg turned by exif, not by xmp": jpeg(exif(3), xmp(b"<tiff:Orientation>8<")),
        "jpeg with two orientations": jpeg(exif(5), exif(8)),
        "jpeg turned by a long": jpeg(exif(7, ">", 4)),
    }
    for mode in ("L", "CMYK", "YCbCr"):
        for progressive in (False, True):
            name = f"{'progressive ' * progressive}{mode} jpeg"
            files[name] = file_of(PICTURE.convert(mode), "JPEG", progressive=progressive)
    for orientation in range(10):
        files[f"jpeg turned {orientation}"] = jpeg(exif(orientation, "<>"[orientation % 2]))
    for colour_type, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        files[f"interlaced png of type {colour_type}"] = interlaced(colour_type, channels)
    for mode in ("RGB", "RGBA", "P", "L"):
        first, *others = moving(mode)
        clip = {"save_all": True, "append_images": others}
        for blend in (0, 1):
            files[f"{mode} apng {blend}"] = file_of(first, "PNG", **clip, blend=blend)
        files[f"{mode} apng behind a picture"] = file_of(first, "PNG", **clip, default_image=True)
        for disposal in (0, 1, 2, 3, [1, 2, 3, 2, 1]):
            files[f"{mode} gif {disposal}"] = file_of(first, "GIF", **clip, disposal=disposal)
        files[f"{mode} gif that says much"] = file_of(
            first, "GIF", **clip, comment=b"hello" * 300, loop=0, transparency=0, interlace=1
        )
        if mode != "P":
            files[f"{mode} webp"] = file_of(first, "WEBP", **clip, exif=turned, xmp=b"x" * 99)
            files[f"mixed {mode} webp"] = file_of(first, "WEBP", **clip, allow_mixed=True)
            files[f"still {mode} webp"] = file_of(first, "WEBP", icc_profile=b"i" * 99)
    for disposal in (1, 2):
        first, *others = moving("RGBA")
        files[f"apng with disposal {disposal}"] = file_of(
            first, "PNG", save_all=True, append_images=others, disposal=disposal
        )
    return files


VALID = valid_files()


def by_pillow_alone(data: bytes) -> np.ndarray:
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            frame = ImageOps.exif_transpose(image) if image.format == "JPEG" else image
            if "A" in frame.mode or "transparency" in frame.info:
                black = Image.new("RGBA", frame.size, (0, 0, 0, 255))
                frame = Image.alpha_composite(black, frame.convert("RGBA"))
            frames.append(np.array(frame.convert("RGB")))
    return np.stack(frames)


@pytest.mark.parametrize("name", VALID)
def test_pixels_are_those_of_the_whole_file(name):
    found = media.decode_clip(VALID[name])
    np.testing.assert_array_equal(found, by_pillow_alone(VALID[name]))
    assert media.stated_shape(VALID[name]) == found.shape[:3]


@pytest.mark.parametrize("name", VALID)
def test_any_file_may_be_cut_or_changed(name):
    """It is read or refused; where the walk reads it, Pillow's errors are told of as others."""
    data = VALID[name]
    draw = np.random.default_rng(1)
    for _ in range(40):
        changed = bytearray(data[: draw.integers(len(data) // 2, len(data) + 1)])
        for _ in range(3):
            changed[draw.integers(len(changed))] = draw.integers(256)
        try:
            media.decode_clip(bytes(changed), Limits(max_pixels=100_000))
        except MediaError as error:
            assert "object at 0x" not in str(error)


# Hostile ones.


def test_a_later_frame_of_a_gif_is_no_larger_than_its_canvas(unopened):
    """Pillow fills a frame's place while it looks for the next, before it can be asked of sizes."""
    vast = control(2) + drawn(0, 0, 13_300, 13_300) + control(2) + drawn(0, 0)
    data = screen() + drawn(0, 0) + vast + b";"
    assert len(data) < 3000
    for read in (media.stated_shape, media.decode_clip, media.decode_mask):
        with pytest.raises(MediaError, match="frame 2 is not inside its 64 x 64 pixels"):
            read(data)
    data = screen() + drawn(0, 0) + drawn(1, 0) + b";"
    with pytest.raises(MediaError, match="frame 2 is not inside"):
        media.decode_clip(data)


def test_the_first_frame_of_a_gif_counts_as_its_canvas(unopened):
    data = screen() + control(2) + drawn(0, 0, 13_300, 13_300) + b";"
    with pytest.raises(MediaError, match="has 1 x 13300 x 13300 pixels; the limit is 16777216"):
        media.stated_shape(data)


def test_frames_of_a_gif_are_counted_before_it_is_opened(unopened):
    data = screen() + drawn(0, 0) * 3 + b";"
    assert media.stated_shape(data) == (3, SIDE, SIDE)
    limits = Limits(max_frames=2)
    assert media.stated_shape(data, limits)[0] == 3


def test_the_canvas_of_a_webp_is_checked_before_it_is_made(unopened):
    with pytest.raises(MediaError, match="has 1 x 13300 x 13300 pixels; the limit is 16777216"):
        media.decode_clip(webp(13_300, 13_300))


def test_a_png_has_one_header(unopened):
    """By a second one, places of later frames would be judged."""
    vast = chunk(b"acTL", struct.pack(">II", 2, 0)) + frame_control(0, SIDE, SIDE)
    second = header(13_000, 13_000) + frame_control(1, 13_000, 13_000, disposal=1)
    with pytest.raises(MediaError, match="it has a second header"):
        media.decode_clip(png(vast, PIXELS, second))


def test_a_frame_of_a_png_outside_its_canvas_is_refused():
    both = chunk(b"acTL", struct.pack(">II", 2, 0)) + frame_control(0, SIDE, SIDE)
    later = frame_control(1, 13_000, 13_000, disposal=1) + chunk(b"fdAT", struct.pack(">I", 2))
    with pytest.raises(MediaError, match="is damaged or cut off"):
        media.decode_clip(png(both, PIXELS, later))


@pytest.mark.parametrize("actl", [struct.pack(">II", 0, 0), b"\0\0\0\2"])
def test_an_animated_png_says_how_many_frames_it_has(actl):
    with pytest.raises(MediaError, match="does not say how many frames it has"):
        media.decode_clip(png(chunk(b"acTL", actl)))


TEXT = zlib.compress(b"a" * (MIB - 8) + "\U0001f600".encode(), 9)
SAID = {
    "international": b"".join(
        chunk(b"iTXt", b"k%d\0\1\0\0\0" % index + TEXT) for index in range(60)
    ),
    "compressed": b"".join(chunk(b"zTXt", b"k%d\0\0" % index + TEXT) for index in range(60)),
    "plain": b"".join(chunk(b"tEXt", b"k%d\0" % index + bytes(1000)) for index in range(500)),
    "profile": chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(64 * MIB), 9)),
    "private": chunk(b"prVt", bytes(60)) * 9000,
}


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_a_png_says_besides_takes_no_memory(name, where):
    data, expected = png(**{where: SAID[name]}), media.decode_clip(png())
    tracemalloc.start()
    np.testing.assert_array_equal(media.decode_clip(data), expected)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB


def test_tags_of_exif_take_no_memory_and_warn_of_nothing(recwarn):
    tags = b"".join(struct.pack("<HHII", 1000 + index, 7, 60_000, 8) for index in range(5000))
    data = jpeg(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + tags))
    tracemalloc.start()
    np.testing.assert_array_equal(media.decode_clip(data), media.decode_clip(JPEG))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB and not recwarn.list


EIGHT = 8 * MIB - 20_000
COSTLY = {  # up to 61 s each by Pillow alone
    "exif": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(14)) * (EIGHT // 24)),
    "comments": lambda: jpeg(segment(0xFE, b"") * (EIGHT // 4)),
    "chunks": lambda: png(chunk(b"prVt", b"") * (EIGHT // 12)),
    "chunks of pixels": lambda: png(pixels=chunk(b"IDAT", b"") * (EIGHT // 12) + PIXELS),
    "blocks": lambda: gif(drawn(0, 0, data=LZW[:-1] + b"\1\0" * (EIGHT // 2) + b"\0")),
    "a comment": lambda: gif(b"!\xfe" + b"\1a" * (EIGHT // 2) + b"\0" + drawn(0, 0)),
    "extensions": lambda: gif(b"!\xfe\0" * (EIGHT // 3) + drawn(0, 0)),
    "frames": lambda: webp(SIDE, SIDE, webp_chunk(b"ANMF", bytes(16)) * (EIGHT // 24)),
}
PASSED_OVER = {
    "fill bytes": lambda: jpeg(b"\xff" * EIGHT),
    "stray zeros": lambda: jpeg(segment(0xE0, b""), bytes(EIGHT)),
    "stray escapes": lambda: jpeg(segment(0xE0, b""), b"\xff\0" * (EIGHT // 2)),
    "long exif": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 130),
    "stray bytes": lambda: gif(bytes(EIGHT) + drawn(0, 0)),
    "long blocks": lambda: gif(b"!\xfe" + (b"\xff" * 256) * (EIGHT // 256) + b"\0" + drawn(0, 0)),
}


@pytest.mark.parametrize("name", COSTLY)
def test_many_small_pieces_are_refused_in_little_time(name, unopened):
    data = COSTLY[name]()
    began = time.process_time()
    for read in (media.stated_shape, media.decode_clip):
        with pytest.raises(MediaError, match="pieces, far more than programs write"):
            read(data)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("name", PASSED_OVER)
def test_stray_bytes_and_long_pieces_cost_little_time(name):
    data = PASSED_OVER[name]()
    began = time.process_time()
    found = media.decode_clip(data)
    assert time.process_time() - began < 2.0
    clean = JPEG if data.startswith(JPEG[:2]) else gif(drawn(0, 0))
    np.testing.assert_array_equal(found, media.decode_clip(clean))


def test_a_jpeg_states_its_size_once():
    again = segment(0xC0, b"\x08" + struct.pack(">HH", 23, 31) + b"\3\1\x11\0\2\x11\0\3\x11\0")
    long = segment(0xC0, b"\x08" + struct.pack(">HH", 23, 31) + b"\3" + b"\1\x11\0" * 20_000)
    for more in (again, long):
        with pytest.raises(MediaError, match="its size is not clear"):
            media.decode_clip(jpeg(more))


def test_scans_of_a_jpeg_are_counted():
    """Each is decoded over the whole picture; what lies between them hides none."""
    data = file_of(PICTURE, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    few, many = containers.MOST_SCANS - 20, containers.MOST_SCANS
    assert media.decode_clip(data[:-2] + few * scan + data[-2:]).shape == (1, 23, 31, 3)
    for between in (b"", b"\xff\xe5\0\0", b"\xff\xfe\0\4\xff\xd9", b"\xff\5\xff\xff"):
        with pytest.raises(MediaError, match="has more than 100 scans"):
            media.decode_clip(data[:-2] + many * (between + scan) + data[-2:])


def test_as_many_files_are_decoded_at_a_time_as_said(monkeypatch):
    monkeypatch.setattr(media, "_decoders", threading.BoundedSemaphore(2))
    load, lock, now, most, done = Image.Image.load, threading.Lock(), [0], [0], []

    def slow(image):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return load(image)

    monkeypatch.setattr(Image.Image, "load", slow)

    def decode():
        for data in (png(), b"", JPEG[:-30]):
            try:
                done.append(media.decode_mask(data).shape)
            except MediaError as error:  # gives its place back too
                done.append(str(error))

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 24 and most == [2]


def test_what_pillow_warns_of_is_neither_shown_nor_kept():
    """In a process of its own: pytest has its own filters."""
    code = """
import sys, warnings
from PIL import Image
from nuwa.runtime import media
for index in range(100):  # as Pillow warns of what is in a file
    text = f'warnings.warn("of file {index}")'
    exec(text, vars(Image))
kept = [m for m in list(sys.modules.values()) if m.__name__.startswith("PIL")
        for key in getattr(m, "__warningregistry__", {}) if key != "version"]
assert not kept, kept
Image.MAX_IMAGE_PIXELS = 100  # so that a small picture draws the warning
data = media.encode_picture(__import__("numpy").zeros((11, 11, 3), "uint8"), "png")
try:
    media.decode_clip(data)
except media.MediaError as error:
    assert "has too many pixels; the limit is 100" in str(error), error
else:
    raise SystemExit("read")
warnings.warn("of others")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:1] == ["<string>:19: UserWarning: of others"]
