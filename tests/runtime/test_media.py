"""Reading hostile files, writing exact ones."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from nuwa.runtime import media
from nuwa.runtime.media import Limits, MediaError
from nuwa.spec.palette import voc_palette

RANDOM = np.random.default_rng(0)
CLIP = RANDOM.integers(0, 256, (4, 8, 12, 3), dtype=np.uint8)
CLIP[2] = CLIP[1]  # equal neighbours, which Pillow would join


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow_animation(kind: str) -> bytes:
    first, *others = (Image.fromarray(frame) for frame in CLIP)
    return file_of(first, kind, save_all=True, append_images=others)


FILES = {
    "png": media.encode_picture(CLIP[0], "png"),
    "webp": media.encode_picture(CLIP[0], "webp"),
    "gif": media.encode_picture(CLIP[0], "gif"),
    "jpeg": file_of(Image.fromarray(CLIP[0]), "JPEG"),
    "animated webp": media.encode_animation(CLIP, "webp"),
    "animated gif": media.encode_animation(CLIP, "gif"),
    "animated png": pillow_animation("PNG"),
    "pillow's gif": pillow_animation("GIF"),
    "pillow's webp": pillow_animation("WEBP"),
}


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_pictures_come_back_bit_identical(kind):
    np.testing.assert_array_equal(media.decode_clip(FILES[kind])[0], CLIP[0])


def test_an_animated_webp_keeps_every_frame_bit_identical():
    np.testing.assert_array_equal(media.decode_clip(FILES["animated webp"]), CLIP)


def test_an_animated_gif_keeps_every_frame_and_few_colours_exactly():
    few = (CLIP // 128 * 255).astype(np.uint8)
    np.testing.assert_array_equal(media.decode_clip(media.encode_animation(few, "gif")), few)


@pytest.mark.parametrize(
    ("kind", "fps", "milliseconds"),
    [("webp", 8, 125), ("webp", 1, 1000), ("webp", 50, 20), ("gif", 8, 120), ("gif", 50, 20)],
)
def test_frames_last_as_long_as_asked(kind, fps, milliseconds):
    with Image.open(io.BytesIO(media.encode_animation(CLIP, kind, fps))) as image:
        assert (image.n_frames, image.info["loop"]) == (4, 0)
        for index in range(4):
            image.seek(index)
            image.load()
            assert image.info["duration"] == milliseconds


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 5), (3, 17, 1)])
def test_odd_sizes_are_animated(size):
    frames = RANDOM.integers(0, 2, (*size, 3), dtype=np.uint8) * 255
    for kind in media.ANIMATION_FORMATS:
        np.testing.assert_array_equal(
            media.decode_clip(media.encode_animation(frames, kind)), frames
        )


def test_raw_is_the_bytes():
    assert media.encode_picture(CLIP[0], "raw") == CLIP[0].tobytes()


def test_upscale_repeats_pixels():
    large = media.upscale(CLIP, 3)
    assert large.shape == (4, 24, 36, 3)
    np.testing.assert_array_equal(large[:, 1::3, 2::3], CLIP)
    np.testing.assert_array_equal(large[:, 0::3, 0::3], CLIP)
    assert media.upscale(CLIP, 1) is CLIP


@pytest.mark.parametrize("factor", [0, -1, 9])
def test_upscale_refuses_other_factors(factor):
    with pytest.raises(ValueError, match=r"not in \[1, 8\]"):
        media.upscale(CLIP, factor)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused(name):
    whole = FILES[name]
    for length in range(len(whole)):
        with pytest.raises(MediaError):
            media.decode_clip(whole[:length])


@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_file_is_read_or_refused_but_never_anything_else(name):
    generator = np.random.default_rng(1)
    for _ in range(150):
        data = np.frombuffer(FILES[name], np.uint8).copy()
        places = generator.integers(0, len(data), 3)
        data[places] = generator.integers(0, 256, 3)
        try:
            frames = media.decode_clip(data.tobytes(), Limits(max_pixels=10_000))
        except MediaError:
            continue
        assert frames.dtype == np.uint8 and frames.ndim == 4 and frames[..., 0].size <= 10_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"a caption, not a picture", "is not a PNG, WEBP, GIF, JPEG file"),
        (b"\x89PNG\r\n\x1a\n", "is not a|is damaged"),
        (file_of(Image.new("RGB", (4, 4)), "BMP"), "is not a"),
        (file_of(Image.new("RGB", (4, 4)), "TIFF"), "is not a"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a"),
    ],
)
def test_other_files_are_refused(data, message):
    with pytest.raises(MediaError, match=message):
        media.decode_clip(data)


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, **more: bytes) -> bytes:
    """A PNG put together by hand. rows: each with its filter, 0; more: further chunks by name."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    others = [chunk(name.encode(), body) for name, body in more.items()]
    chunks = [chunk(b"IHDR", header), *others, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IEND", b"")])


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    return png(width, height, 8, 2, bytes(100))


@pytest.mark.parametrize("size", [(5000, 5000), (13_000, 13_000), (65_000, 65_000)])
def test_a_bomb_is_refused_before_its_pixels_are_decoded(size, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the file was opened"))
    with pytest.raises(MediaError, match="the limit is 16777216"):
        media.decode_clip(png_header(*size))


@pytest.mark.parametrize("name", ["animated webp", "animated gif", "animated png"])
def test_frames_count_towards_the_limits(name):
    frame = CLIP[0, ..., 0].size
    assert len(media.decode_clip(FILES[name], Limits(max_pixels=4 * frame))) >= 3
    with pytest.raises(MediaError, match="pixels; the limit is"):
        media.decode_clip(FILES[name], Limits(max_pixels=2 * frame))
    with pytest.raises(MediaError, match="more than 2 frames"):
        media.decode_clip(FILES[name], Limits(max_frames=2))


def test_files_that_are_too_long_are_refused_unopened(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the file was opened"))
    with pytest.raises(MediaError, match="is 1001 bytes long; the limit is 1000"):
        media.decode_clip(bytes(1001), Limits(max_bytes=1000))


def test_transparency_is_put_on_black():
    image = np.full((2, 2, 4), 200, np.uint8)
    image[..., 3] = [[255, 0], [0, 255]]
    decoded = media.decode_clip(file_of(Image.fromarray(image), "PNG"))[0]
    assert decoded[..., 0].tolist() == [[200, 0], [0, 200]]


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_pictures_are_refused(colour_type, channels):
    data = png(1, 1, 16, colour_type, bytes(1 + 2 * channels))
    with pytest.raises(MediaError, match="16 bits a channel; at most 8 bits"):
        media.decode_clip(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("extra", [b"\n", b"\0" * 5, b"<!-- sent by mail -->" * 9])
def test_what_follows_the_end_of_a_file_is_passed_over(name, extra):
    expected = media.decode_clip(FILES[name])
    np.testing.assert_array_equal(media.decode_clip(FILES[name] + extra), expected)


@pytest.mark.parametrize("name", ["animated webp", "animated gif", "pillow's gif"])
def test_only_some_frames_of_a_long_clip(name, monkeypatch):
    every = media.decode_clip(FILES[name])
    np.testing.assert_array_equal(media.decode_clip(FILES[name], last=2), every[-2:])
    np.testing.assert_array_equal(media.decode_clip(FILES[name], first=9), every)
    np.testing.assert_array_equal(media.decode_clip(FILES[name], last=9), every)
    few = Limits(max_frames=2, max_pixels=2 * CLIP[0, ..., 0].size)
    with pytest.raises(MediaError, match="more than 2 frames|the limit is"):
        media.decode_clip(FILES[name], few, last=2)
    np.testing.assert_array_equal(media.decode_clip(FILES[name], few, first=2), every[:2])


@pytest.mark.parametrize("name", FILES)
def test_the_stated_shape_takes_no_decoding(name, monkeypatch):
    shape = media.decode_clip(FILES[name]).shape[:3]
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the file was opened"))
    assert media.stated_shape(FILES[name]) == shape


@pytest.mark.parametrize("kind", media.ANIMATION_FORMATS)
def test_frames_of_an_animation_are_scaled_one_by_one(kind):
    frames = np.zeros((40, 64, 64, 3), np.uint8)
    tracemalloc.start()
    data = media.encode_animation(frames, kind, scale=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert media.decode_clip(data, first=1).shape == (1, 256, 256, 3)
    assert peak < 40 * 256 * 256 * 3 / 4


def test_photographs_are_turned_upright():
    photo = Image.new("RGB", (8, 4))
    exif = photo.getexif()
    exif[0x0112] = 6
    data = file_of(photo, "JPEG", exif=exif)
    assert media.decode_clip(data).shape == (1, 8, 4, 3)
    assert media.stated_shape(data) == (1, 8, 4)


def test_a_jpeg_with_further_pictures_behind_it_is_its_first():
    """MPO, as cameras make them, to which Pillow gives another name."""
    photo = Image.fromarray(CLIP[0])
    exif = photo.getexif()
    exif[0x0112] = 6
    data = file_of(photo, "MPO", exif=exif, save_all=True, append_images=[Image.fromarray(CLIP[1])])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
    height, width, _ = CLIP[0].shape
    found = media.decode_clip(data)
    assert found.shape == (1, width, height, 3)
    assert media.stated_shape(data) == (1, width, height)
    single = media.decode_clip(file_of(photo, "JPEG", exif=exif))
    assert np.abs(found.astype(int) - single).max() < 32
    with pytest.raises(MediaError, match="is a JPEG, which changes class ids"):
        media.decode_class_map(data, 21)


CLASSES = 21
IDS = np.arange(12, dtype=np.uint8).reshape(3, 4) + 9
MAPS = np.stack([IDS, IDS[::-1], IDS[::-1], 0 * IDS])
COLOURS = voc_palette(CLASSES)[MAPS]


def palette_image(ids: np.ndarray, palette: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids, "L").convert("P")
    image.putpalette(palette.flatten().tolist())
    image.putdata(ids.flatten().tolist())
    return image


def palette_clip(kind: str, palette: np.ndarray) -> bytes:
    first, *others = (palette_image(ids, palette) for ids in MAPS[[0, 1, 3]])
    options = {"optimize": False} | ({"disposal": 1} if kind == "GIF" else {})
    return file_of(first, kind, save_all=True, append_images=others, **options)


@pytest.mark.parametrize("transparent", [None, 9])
def test_class_ids_are_the_indices_of_a_palette_png(transparent):
    image = palette_image(IDS, np.full((256, 3), (255, 0, 17)))
    options = {} if transparent is None else {"transparency": transparent}
    data = file_of(image, "PNG", optimize=False, **options)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), IDS[None])


ORDER = np.argsort(np.random.default_rng(2).random(12)).astype(np.uint8)  # where 9 to 20 went
RENUMBERED = palette_image(ORDER[IDS - 9], voc_palette(CLASSES)[9:][np.argsort(ORDER)])


def test_class_ids_are_the_colours_of_a_palette_png_that_was_numbered_anew():
    data = file_of(RENUMBERED, "PNG", optimize=False)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), IDS[None])
    with pytest.raises(MediaError, match="has class id 20 at column 3, row 2 of frame 0"):
        media.decode_class_map(data, CLASSES - 1)


def test_one_colour_of_no_class_means_indices():
    """Also where only another frame of a clip has it."""
    palette = voc_palette(256)[::-1].copy()
    palette[20] = (1, 2, 3)
    first, other = (palette_image(ids, palette) for ids in (0 * IDS, IDS))
    data = file_of(other, "PNG", optimize=False)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), [IDS])
    data = file_of(first, "PNG", save_all=True, append_images=[other], optimize=False)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), [0 * IDS, IDS])


@pytest.mark.parametrize("transparent", [None, 1])
@pytest.mark.parametrize(
    ("depth", "rows", "ids"),
    [(1, b"\0\x50", [0, 1, 0, 1]), (2, b"\0\x1b", [0, 1, 2, 3]), (4, b"\0\x01\x2f", [0, 1, 2, 15])],
)
def test_class_ids_are_the_greys_of_a_png_of_few_bits(depth, rows, ids, transparent):
    more = {} if transparent is None else {"tRNS": struct.pack(">H", transparent)}
    data = png(4, 1, depth, 0, rows, **more)
    expected = [0 if each == transparent else each for each in ids]
    assert media.decode_class_map(data, CLASSES).tolist() == [[expected]]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_class_ids_are_the_greys_of_other_pictures(kind):
    grey = Image.fromarray(IDS)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(grey.convert("RGB") if kind == "WEBP" else grey, kind, **options)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), IDS[None])


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_colours_of_the_palette_are_classes(kind):
    data = media.encode_picture(COLOURS[0], kind)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), IDS[None])
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = media.encode_picture(voc_palette(256)[every], kind)
    np.testing.assert_array_equal(media.decode_class_map(data, 256), every[None])


@pytest.mark.parametrize("kind", media.ANIMATION_FORMATS)
@pytest.mark.parametrize("frames", [COLOURS, np.repeat(MAPS[..., None], 3, axis=-1)])
def test_class_maps_of_a_clip_are_colours_or_greys(kind, frames):
    """Every frame is there, equal neighbours and an empty one too."""
    data = media.encode_animation(frames, kind)
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), MAPS)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_class_maps_of_other_writers(kind):
    """A PNG's palette indices are the ids; of a GIF's palette, the colours name the classes."""
    data = palette_clip(kind, voc_palette(256))
    np.testing.assert_array_equal(media.decode_class_map(data, CLASSES), MAPS[[0, 1, 3]])


def test_the_grey_of_a_class_is_no_id_where_ids_are_small():
    grey = np.full((2, 2, 3), 128, np.uint8)  # class 7
    data = media.encode_picture(grey, "webp")
    assert (media.decode_class_map(data, CLASSES) == 7).all()
    assert (media.decode_class_map(data, 256) == 128).all()


def changed(colour: tuple[int, int, int]) -> np.ndarray:
    frames = COLOURS.copy()
    frames[2, 1, 3] = colour
    return frames


BAD_MAPS = {
    "colour": (
        media.encode_picture(changed((1, 2, 3))[2], "png"),
        r"has the colour \(1, 2, 3\) at column 3, row 1 of frame 0, which no class from 0 to 20",
    ),
    "class beyond": (
        media.encode_animation(changed(tuple(voc_palette(256)[21])), "webp"),
        r"has the colour \(128, 64, 128\) at column 3, row 1 of frame 2",
    ),
    "palette of a gif": (palette_clip("GIF", np.full((256, 3), (255, 0, 17))), "has the colour"),
    "index": (
        file_of(palette_image(IDS + 2, voc_palette(256)), "PNG", optimize=False),
        "has class id 21 at column 2, row 2 of frame 0; this model's class ids are 0 to 20",
    ),
    "grey png": (
        file_of(Image.fromarray(np.full((2, 2), 128, np.uint8)), "PNG"),
        "has class id 128 at column 0, row 0",
    ),
    "grey webp": (
        media.encode_picture(np.full((2, 2, 3), 30, np.uint8), "webp"),
        "has class id 30 at column 0, row 0",
    ),
    "jpeg": (FILES["jpeg"], "is a JPEG, which changes class ids"),
    "photograph": (FILES["webp"], "has the colour"),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_class_maps_without_classes_are_refused(name):
    data, message = BAD_MAPS[name]
    with pytest.raises(MediaError, match=message):
        media.decode_class_map(data, CLASSES)


def test_a_mask_is_what_is_bright():
    values = np.array([[0, 127], [128, 255]], np.uint8)
    mask = media.decode_mask(file_of(Image.fromarray(values), "PNG"))
    assert mask.tolist() == [[False, False], [True, True]]


def test_a_mask_of_many_frames_is_refused_undecoded(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the file was opened"))
    with pytest.raises(MediaError, match="4 frames; a mask is one picture"):
        media.decode_mask(FILES["animated webp"])


@pytest.mark.parametrize("fps", [0, -8, 51])
def test_absurd_speeds_are_refused(fps):
    with pytest.raises(ValueError, match="frames_per_second"):
        media.encode_animation(CLIP, "webp", fps)


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="'jpeg' is not one of png, webp, gif, raw"):
        media.encode_picture(CLIP[0], "jpeg")
    with pytest.raises(ValueError, match="'png' is not one of webp, gif"):
        media.encode_animation(CLIP, "png")
