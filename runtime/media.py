"""Pictures and clips in files: reading what users send, writing what they get.

What users send is taken for hostile: Pillow gets no more of a file than its pixels, and that when
their number is known (containers.py). Whatever is wrong with a file is one MediaError. Knows
nothing of requests, of the model's size or of gRPC.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import animation, containers
from .class_maps import check_ids, ids_of_colours, ids_of_indices
from .containers import Container, png_samples
from .core import Mask, Pixels

PICTURE_FORMATS = ("png", "webp", "gif", "raw")
ANIMATION_FORMATS = ("webp", "gif")
MAX_SCALE = 8
MAX_FRAMES_PER_SECOND = 50
DEFAULT_FRAMES_PER_SECOND = 8

_TURNS = {  # by EXIF's number of an orientation; 5 to 8 swap rows and columns
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPARENT_MODES = ("LA", "PA", "RGBA", "La", "RGBa")

# As many files are decoded at a time as there are cores: more would take no less time, and the
# memory that each takes at its peak would add up. Who holds one waits for nothing.
_affinity = getattr(os, "sched_getaffinity", None)
_decoders = threading.BoundedSemaphore(len(_affinity(0)) if _affinity else os.cpu_count() or 1)

# Pillow warns of what is in a file. A text that is shown, on stderr, is kept for good, so whoever
# sends files could fill the memory with them; what is ignored is not kept. For the whole process,
# as warnings.catch_warnings is not for threads; other warnings and other libraries' stay.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# A second line: limits are checked before Pillow sees a file, which draws no such warning then.
# Training does not import this module, and may read what pictures it likes.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


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


def stated_shape(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int, int]:
    """(frames, height, width) as a file states them, upright; no pixel is decoded.

    MediaError for what can be seen to be wrong so far; of the limits, a single frame's.
    """
    with _decoders:
        file = _walked(data, limits)
    turned = file.orientation in range(5, 9)
    return (file.frames, *((file.width, file.height) if turned else (file.height, file.width)))


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
    frames, _, _ = stated_shape(data, limits)
    if frames != 1:
        raise MediaError(f"has {frames} frames; a mask is one picture")
    grey = _decode(
        data, limits, lambda image: np.asarray(Image.fromarray(_to_rgb(image)).convert("L"))
    )
    return grey[0] >= 128


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
    with _decoders, _opened(data, limits) as (file, image):
        if file.kind == "PNG" and (depth := png_samples(file.data).depth) > 8:
            raise MediaError(f"has {depth} bits a channel; at most 8 bits a channel are read")
        frames = map(convert, _frames(file, image, limits, first))
        return np.stack(deque(frames, maxlen=last))


def _walked(data: bytes, limits: Limits) -> Container:
    """The file, without all that is no pixels; none of its frames is too large."""
    if not data:
        raise MediaError("is empty")
    if len(data) > limits.max_bytes:
        raise MediaError(f"is {len(data)} bytes long; the limit is {limits.max_bytes}")
    try:
        file = containers.read(data)
    except ValueError as error:
        raise MediaError(str(error)) from error
    limits.check(1, file.height, file.width)
    return file


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[tuple[Container, Image.Image]]:
    """The file, not yet decoded; whatever goes wrong with it inside is a MediaError."""
    file = _walked(data, limits)
    try:
        with Image.open(io.BytesIO(file.data), formats=(file.kind,)) as image:
            stated = (file.frames, file.height, file.width)
            # Of a GIF it does not know how many frames there are before it has read them.
            frames = file.frames if file.kind == "GIF" else getattr(image, "n_frames", 1)
            if (frames, image.height, image.width) != stated:
                raise MediaError("is damaged or cut off: it says its size twice, differently")
            yield file, image
    except MediaError:
        raise
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"is damaged or cut off: its {file.kind} header is wrong") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = min(limits.max_pixels, Image.MAX_IMAGE_PIXELS or limits.max_pixels)
        raise MediaError(f"has too many pixels; the limit is {most}") from error
    except Exception as error:
        # Pillow's readers raise half a dozen kinds of error on broken files, struct.error and
        # SyntaxError among them. All mean the same to whoever sent the file.
        raise MediaError(f"is damaged or cut off: {error}") from error


def _frames(
    file: Container, image: Image.Image, limits: Limits, most: int | None
) -> Iterator[Image.Image]:
    """The first `most` frames in turn, checked against the limits before one is decoded."""
    frames = file.frames if most is None else min(file.frames, most)
    limits.check(frames, file.height, file.width)
    for index in range(frames):
        try:
            image.seek(index)
        except EOFError:
            raise MediaError(f"is cut off: {index} of {frames} frames are there") from None
        image.load()
        yield _upright(image, file.orientation) if file.kind == "JPEG" else image


def _upright(photo: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _TURNS:
        return photo
    turned = photo.transpose(_TURNS[orientation])
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
