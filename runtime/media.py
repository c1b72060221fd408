"""Pictures and clips in files: reading what users send, writing what they get.

What users send is taken for hostile: sizes are checked before pixels are decoded, and whatever is
wrong with a file is one MediaError. Knows nothing of requests, of the model's size or of gRPC.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from . import animation
from .class_maps import check_ids, ids_of_colours
from .core import Mask, Pixels

READABLE_FORMATS = ("PNG", "WEBP", "GIF", "JPEG")
PICTURE_FORMATS = ("png", "webp", "gif", "raw")
ANIMATION_FORMATS = ("webp", "gif")
MAX_SCALE = 8
MAX_FRAMES_PER_SECOND = 50
DEFAULT_FRAMES_PER_SECOND = 8

_EIGHT_BIT_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
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


def decode_clip(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """A PNG, WebP, GIF or JPEG file, animated or not, as u8 [F, H, W, 3].

    Transparency is put on black. MediaError for anything that cannot be read completely.
    """
    return _decode(data, limits, _to_rgb)


def decode_class_map(
    data: bytes, classes: int, limits: Limits = DEFAULT_LIMITS
) -> npt.NDArray[np.uint8]:
    """A segmentation map as class ids u8 [F, H, W], all below `classes`.

    A palette PNG gives its palette indices, a grey picture its grey values; colours must be those
    of spec/palette.py. Animated or not; frames of GIFs and WebPs count as colours. MediaError as
    decode_clip, for ids and colours that are no class, and for JPEG, which changes both.
    """
    samples = _decode(data, limits, _to_class_samples)
    try:
        if samples.ndim == 4:
            return ids_of_colours(samples, classes)
        check_ids(samples, classes)
    except ValueError as error:
        raise MediaError(str(error)) from error
    return samples


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
    frames: Pixels, kind: str, frames_per_second: int = DEFAULT_FRAMES_PER_SECOND
) -> bytes:
    """u8 [F, H, W, 3] as an animated "webp" (lossless) or "gif" (256 colours a frame)."""
    if not 1 <= frames_per_second <= MAX_FRAMES_PER_SECOND:
        raise ValueError(
            f"frames_per_second {frames_per_second} is not in [1, {MAX_FRAMES_PER_SECOND}]"
        )
    if kind not in ANIMATION_FORMATS:
        raise ValueError(f"animation format {kind!r} is not one of {', '.join(ANIMATION_FORMATS)}")
    encode = animation.webp if kind == "webp" else animation.gif
    return encode(frames, round(1000 / frames_per_second))


def upscale(pixels: Pixels, factor: int) -> Pixels:
    """u8 [..., H, W, 3] with every pixel repeated to a square of factor x factor; factor 1 to 8."""
    if not 1 <= factor <= MAX_SCALE:
        raise ValueError(f"scale factor {factor} is not in [1, {MAX_SCALE}]")
    if factor == 1:
        return pixels
    return pixels.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _decode(
    data: bytes, limits: Limits, convert: Callable[[Image.Image], npt.NDArray[np.uint8]]
) -> npt.NDArray[np.uint8]:
    if not data:
        raise MediaError("is empty")
    if len(data) > limits.max_bytes:
        raise MediaError(f"is {len(data)} bytes long; the limit is {limits.max_bytes}")
    try:
        return np.stack([convert(image) for image in _frames(data, limits)])
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


def _frames(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """Every frame in turn, checked against the limits before its pixels are decoded."""
    with Image.open(io.BytesIO(data), formats=READABLE_FORMATS) as image:
        limits.check(1, image.height, image.width)
        if not _has_end(data, image.format):
            raise MediaError(f"is cut off: the end of a {image.format} file is missing")
        # A GIF does not say how many frames it has, and counting them takes reading them.
        expected = None if image.format == "GIF" else getattr(image, "n_frames", 1)
        limits.check(expected or 1, image.height, image.width)
        count = 0
        while True:
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


def _has_end(data: bytes, kind: str | None) -> bool:
    """Whether a file is whole at its end; Pillow reads these two to wherever they break off."""
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in data[-64:]  # some writers put a few bytes behind it
    return kind != "GIF" or data.rstrip(b"\0").endswith(b"\x3b")


def _upright(photo: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(photo)
    turned.format = photo.format  # a copy forgets it
    return turned


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (0, 0, 0, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    elif image.mode not in _EIGHT_BIT_MODES:
        raise MediaError(f"has pixels of mode {image.mode}; 8 bits a channel are read")
    return np.array(image.convert("RGB"))


def _to_class_samples(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Ids [H, W] where a file says them outright, else colours [H, W, 3]."""
    if image.format == "JPEG":
        raise MediaError("is a JPEG, which changes class ids; send a PNG")
    plain_grey = image.mode == "L" and "transparency" not in image.info
    if image.format == "PNG" and (image.mode == "P" or plain_grey):
        return np.array(image)
    return _to_rgb(image)
