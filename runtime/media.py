"""Pictures and clips in files: reading what users send, writing what they get.

What users send is taken for hostile: sizes are checked before pixels are decoded, and whatever is
wrong with a file is one MediaError. Knows nothing of requests, of the model's size or of gRPC.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, JpegImagePlugin

from . import animation
from .class_maps import check_ids, ids_of_colours, ids_of_indices
from .containers import is_whole, png_samples
from .core import Mask, Pixels

READABLE_FORMATS = ("PNG", "WEBP", "GIF", "JPEG")
PICTURE_FORMATS = ("png", "webp", "gif", "raw")
ANIMATION_FORMATS = ("webp", "gif")
MAX_SCALE = 8
MAX_FRAMES_PER_SECOND = 50
DEFAULT_FRAMES_PER_SECOND = 8

_ORIENTATION = 0x0112  # of EXIF; 5 and above swap rows and columns
_TRANSPARENT_MODES = ("LA", "PA", "RGBA", "La", "RGBa")


class MediaError(ValueError):
    """A picture or clip that cannot be read or is too large; the message says which and why."""


@dataclass(frozen=True)
class Limits:
    """What one picture or clip may measure: bytes as sent; pixels and frames when decoded."""

    max_bytes: int = 8 * 2**20
    max_pixels: int = 2**24
    max_frames: int = 256

    def check(self, frames: int, height: int, width: int) -> None:
        """MediaError if so many pixels are too many."""
        if frames > self.max_frames:
            raise MediaError(f"has more than {self.max_frames} frames, the most that are read")
        if frames * height * width > self.max_pixels:
            raise MediaError(
                f"has {frames} x {height} x {width} pixels; the limit is {self.max_pixels}"
            )


DEFAULT_LIMITS = Limits()


def stated_size(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) as the head of a file has them; no pixel is decoded.

    MediaError for what can be seen to be wrong so far.
    """
    with _opened(data, limits) as image:
        turned = image.format == "JPEG" and image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def decode_clip(
    data: bytes,
    limits: Limits = DEFAULT_LIMITS,
    *,
    first: int | None = None,
    last: int | None = None,
) -> Pixels:
    """A PNG, WebP, GIF or JPEG file, animated or not, as u8 [F, H, W, 3].

    first, last: only so many frames from that end, or all if there are fewer. Frames behind the
    first are not read; those before the last are read and forgotten, and count as read towards the
    limits. Transparency is put on black. MediaError for anything that cannot be read completely.
    """
    return _decode(data, limits, _to_rgb, first, last)


def decode_class_map(
    data: bytes, classes: int, limits: Limits = DEFAULT_LIMITS
) -> npt.NDArray[np.uint8]:
    """A segmentation map as class ids u8 [F, H, W], all below `classes`.

    A palette PNG gives its palette indices (but see class_maps.ids_of_indices), a grey picture its
    grey values, at any depth; colours must be those of spec/palette.py. Animated or not; frames of
    GIFs and WebPs count as colours. MediaError as decode_clip, for ids and colours that are no
    class, and for JPEG, which changes both.
    """
    samples = _decode(data, limits, _to_class_samples)
    try:
        if samples.ndim == 4:
            return ids_of_colours(samples, classes)
        ids = _stated_ids(samples, data)
        check_ids(ids, classes)
    except ValueError as error:
        raise MediaError(str(error)) from error
    return ids


def decode_mask(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Mask:
    """A picture as bool [H, W]: True where it is 128 or brighter. MediaError as decode_clip."""
    frames = _decode(
        data, limits, lambda image: np.asarray(Image.fromarray(_to_rgb(image)).convert("L"))
    )
    if len(frames) != 1:
        raise MediaError(f"has {len(frames)} frames; a mask is one picture")
    return frames[0] >= 128


def encode_picture(pixels: Pixels, kind: str) -> bytes:
    """u8 [H, W, 3] as "png", "webp" (lossless), "gif" (256 colours) or "raw" (the bytes)."""
    if kind == "raw":
        return pixels.tobytes()
    if kind not in PICTURE_FORMATS:
        raise ValueError(f"picture format {kind!r} is not one of {', '.join(PICTURE_FORMATS)}")
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(pixels).save(buffer, kind.upper(), **options)
    return buffer.getvalue()


def encode_animation(
    frames: Pixels | Sequence[Pixels],
    kind: str,
    frames_per_second: int = DEFAULT_FRAMES_PER_SECOND,
    scale: int = 1,
) -> bytes:
    """u8 [F, H, W, 3] as an animated "webp" (lossless) or "gif" (256 colours a frame).

    scale: as upscale's factor; frames are scaled one by one, so memory does not grow with it.
    """
    if not 1 <= frames_per_second <= MAX_FRAMES_PER_SECOND:
        raise ValueError(
            f"frames_per_second {frames_per_second} is not in [1, {MAX_FRAMES_PER_SECOND}]"
        )
    if kind not in ANIMATION_FORMATS:
        raise ValueError(f"animation format {kind!r} is not one of {', '.join(ANIMATION_FORMATS)}")
    encode = animation.webp if kind == "webp" else animation.gif
    height, width, _ = frames[0].shape
    scaled = (upscale(frame, scale) for frame in frames)
    return encode(scaled, height * scale, width * scale, round(1000 / frames_per_second))


def upscale(pixels: Pixels, factor: int) -> Pixels:
    """u8 [..., H, W, 3] with every pixel repeated to a square of factor x factor; factor 1 to 8."""
    if not 1 <= factor <= MAX_SCALE:
        raise ValueError(f"scale factor {factor} is not in [1, {MAX_SCALE}]")
    if factor == 1:
        return pixels
    return pixels.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _decode(
    data: bytes,
    limits: Limits,
    convert: Callable[[Image.Image], npt.NDArray[np.uint8]],
    first: int | None = None,
    last: int | None = None,
) -> npt.NDArray[np.uint8]:
    with _opened(data, limits) as image:
        if not is_whole(data, image.format):
            raise MediaError(f"is cut off: the end of a {image.format} file is missing")
        if image.format == "PNG" and (depth := png_samples(data).depth) > 8:
            raise MediaError(f"has {depth} bits a channel; at most 8 bits a channel are read")
        frames = map(convert, _frames(image, limits, first))
        return np.stack(deque(frames, maxlen=last))


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """The file, not yet decoded; whatever goes wrong with it inside is a MediaError."""
    if not data:
        raise MediaError("is empty")
    if len(data) > limits.max_bytes:
        raise MediaError(f"is {len(data)} bytes long; the limit is {limits.max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=READABLE_FORMATS) as image:
            limits.check(1, image.height, image.width)
            if image.format != "MPO":
                yield image
                return
        # A JPEG with further pictures behind it, as cameras make them: the first is the picture.
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            yield image
    except MediaError:
        raise
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"is not a {', '.join(READABLE_FORMATS)} file") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"has too many pixels; the limit is {limits.max_pixels}") from error
    except Exception as error:
        # Pillow's readers raise half a dozen kinds of error on broken files, struct.error and
        # SyntaxError among them. All mean the same to whoever sent the file.
        raise MediaError(f"is damaged or cut off: {error}") from error


def _frames(image: Image.Image, limits: Limits, most: int | None) -> Iterator[Image.Image]:
    """The first `most` frames in turn, checked against the limits before they are decoded."""
    # A GIF does not say how many frames it has, and counting them takes reading them.
    stated = None if image.format == "GIF" else getattr(image, "n_frames", 1)
    expected = stated if most is None or stated is None else min(stated, most)
    limits.check(expected or 1, image.height, image.width)
    count = 0
    while count != most:
        try:
            image.seek(count)
        except EOFError:
            break
        count += 1
        limits.check(count, image.height, image.width)
        image.load()
        yield _upright(image) if image.format == "JPEG" else image
    if expected is not None and count != expected:
        raise MediaError(f"is cut off: {count} of {expected} frames are there")


def _upright(photo: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(photo)
    turned.format = photo.format  # a copy forgets it
    return turned


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (0, 0, 0, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.array(image.convert("RGB"))


def _to_class_samples(image: Image.Image) -> npt.NDArray[np.uint8]:
    """What _stated_ids takes, [H, W], where a file says ids outright, else colours [H, W, 3]."""
    if image.format == "JPEG":
        raise MediaError("is a JPEG, which changes class ids; send a PNG")
    if image.format == "PNG" and image.mode in ("P", "L", "1"):
        return np.array(image if image.mode == "P" else image.convert("L"))
    return _to_rgb(image)


def _stated_ids(samples: npt.NDArray[np.uint8], png: bytes) -> npt.NDArray[np.uint8]:
    """Ids u8 [F, H, W] of a PNG from its palette indices, or its greys as Pillow scales them.

    A transparent grey is put on black, so it is 0.
    """
    stated = png_samples(png)
    if stated.palette is not None:
        return ids_of_indices(samples, stated.palette)
    ids = samples // (255 // (2**stated.depth - 1))
    if stated.transparent is not None:
        ids[ids == stated.transparent] = 0
    return ids
