"""Requests of nuwa.v1 from Python values: names, arrays, files' bytes and paths.

For the client and the command line. Judges nothing that the server judges (convert.py).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from nuwa.spec.tasks import Task, parse_task
from nuwa.v1 import generation_pb2 as pb

from . import media
from .convert import TASK_VALUES

MediaLike = bytes | Path | npt.NDArray[np.generic]
MaskLike = MediaLike | Sequence[tuple[int, int, int, int]]

FORMATS = {
    "png": pb.IMAGE_FORMAT_PNG,
    "webp": pb.IMAGE_FORMAT_WEBP,
    "gif": pb.IMAGE_FORMAT_GIF,
    "raw": pb.IMAGE_FORMAT_RAW_RGB,
}
ANIMATION_FORMATS = {
    None: pb.ANIMATION_FORMAT_UNSPECIFIED,
    "webp": pb.ANIMATION_FORMAT_WEBP,
    "gif": pb.ANIMATION_FORMAT_GIF,
}
SCHEDULES = {"wave": pb.SCHEDULE_WAVE, "raster": pb.SCHEDULE_RASTER}


class Options(TypedDict, total=False):
    """Keyword arguments that images and clips share; None and absent leave it to the server.

    mask: a picture (bright is generated), bool [H, W], or boxes (left, top, width, height).
    sketch: a file, class ids u8 [H, W] or [F, H, W], or their colours in the palette of PASCAL VOC
    u8 [H, W, 3] or [F, H, W, 3]; an array whose last axis is 3 is colours.
    samples: how many to generate; rank_by: a ranker that finds the best of them; return_count: how
    many of the best to return.
    scale: integer upscaling, 1 to 8. schedule: "wave" or "raster".
    output_format: "raw" (default), "png", "webp" or "gif".
    """

    mask: MaskLike | None
    sketch: MediaLike | None
    seed: int | None
    sample_index: int
    samples: int | None
    rank_by: str | None
    return_count: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance_scale: float | None
    schedule: str
    scale: int
    output_format: str
    include_tokens: bool
    request_id: str
    model: str | None


class ImageOptions(Options, total=False):
    """image: a file's bytes, a path, or u8 [H, W, 3]."""

    image: MediaLike | None


class VideoOptions(Options, total=False):
    """video: a file's bytes, a path, or u8 [F, H, W, 3]. animation_format: "webp" or "gif"."""

    video: MediaLike | None
    frame_count: int | None
    animation_format: str | None
    frames_per_second: int | None


LONGEST = 1e8  # seconds, three years: gRPC's clocks do not take any number
_SAMPLING = ("seed", "sample_index", "temperature", "top_k", "top_p", "guidance_scale")
_SHARED = tuple(Options.__annotations__)
_IMAGE_ONLY = ("image",)
_VIDEO_ONLY = ("video", "frame_count", "animation_format", "frames_per_second")


def image_request(task: Task | str, prompt: str, options: ImageOptions) -> pb.GenerateImageRequest:
    """ValueError for unknown names and for numbers that no field can hold, TypeError for types."""
    message = pb.GenerateImageRequest()
    given = _given(options, _SHARED + _IMAGE_ONLY)
    _fill(message, task, prompt, given)
    if "image" in given:
        message.image.CopyFrom(_media(given["image"], "image", 3))
    return message


def video_request(task: Task | str, prompt: str, options: VideoOptions) -> pb.GenerateVideoRequest:
    """ValueError for unknown names and for numbers that no field can hold, TypeError for types."""
    message = pb.GenerateVideoRequest()
    given = _given(options, _SHARED + _VIDEO_ONLY)
    _fill(message, task, prompt, given)
    if "video" in given:
        message.video.CopyFrom(_media(given["video"], "video", 3))
    for name in ("frame_count", "frames_per_second"):
        _set(message, name, given)
    animation = given.get("animation_format")
    message.animation_format = _choose("animation_format", animation, ANIMATION_FORMATS)
    return message


def time_limit(deadline: float | None) -> float | None:
    """The seconds that a call may take; None for no limit. ValueError if that is no time at all."""
    if deadline is None or deadline == math.inf:
        return None
    if not deadline > 0:
        raise ValueError(f"deadline {deadline} is not a number of seconds above 0")
    return min(deadline, LONGEST)


def _given(options: Any, names: tuple[str, ...]) -> dict[str, Any]:
    for name in options:
        if name not in names:
            raise TypeError(f"unknown option {name!r}; there are {', '.join(names)}")
    return {name: value for name, value in options.items() if value is not None}


def _text(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt {prompt!r} is not a str")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # as of a command line that is not UTF-8
        raise ValueError(f"prompt {prompt!a} is not valid Unicode") from None
    return prompt


def _fill(
    message: pb.GenerateImageRequest | pb.GenerateVideoRequest,
    task: Task | str,
    prompt: str,
    given: dict[str, Any],
) -> None:
    message.task = TASK_VALUES[parse_task(task)]
    message.prompt = _text(prompt)
    message.schedule = _choose("schedule", given.get("schedule", "wave"), SCHEDULES)
    message.output.format = _choose("output_format", given.get("output_format", "raw"), FORMATS)
    message.output.include_tokens = given.get("include_tokens", False)
    message.request_id = str(uuid.uuid4())  # so that a retry is known to be one
    for name in ("request_id", "model", "rank_by", "return_count"):
        _set(message, name, given)
    if "samples" in given:
        _set(message, "sample_count", {"sample_count": given["samples"]})
    for name in _SAMPLING:
        _set(message.sampling, name, given)
    if "scale" in given:
        _set(message.output, "scale_factor", {"scale_factor": given["scale"]})
    if "sketch" in given:
        message.sketch.CopyFrom(_sketch(given["sketch"]))
    if "mask" in given:
        message.mask.CopyFrom(_mask(given["mask"]))


def _set(message: Message, name: str, given: dict[str, Any]) -> None:
    if name in given:
        try:
            setattr(message, name, given[name])
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name} {given[name]!r} is not possible: {error}") from error


def _choose(name: str, value: Any, choices: dict[Any, Any]) -> Any:
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice)
        raise ValueError(f"{name} {value!r} is not one of {names}")
    return choices[value]


def _media(value: MediaLike, name: str, channels: int) -> pb.Media:
    if isinstance(value, Path):
        return pb.Media(encoded=value.read_bytes())
    if isinstance(value, bytes):
        return pb.Media(encoded=value)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is of type {type(value).__name__}, not bytes, Path or an array")
    shape = value.shape[:-1] if channels > 1 else value.shape
    right_channels = channels == 1 or value.shape[-1:] == (channels,)
    if value.dtype not in (np.uint8, np.bool_) or len(shape) not in (2, 3) or not right_channels:
        wanted = "[H, W] or [F, H, W]" if channels == 1 else "[H, W, 3] or [F, H, W, 3]"
        raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not uint8 {wanted}")
    frame_count, height, width = shape if len(shape) == 3 else (1, *shape)
    data = value.astype(np.uint8, copy=False).tobytes()
    raw = pb.RawFrames(data=data, frame_count=frame_count, height=height, width=width)
    return pb.Media(raw=raw)


def _sketch(value: MediaLike) -> pb.Media:
    if not (isinstance(value, np.ndarray) and value.ndim > 2 and value.shape[-1] == 3):
        return _media(value, "sketch", 1)
    if value.dtype != np.uint8 or value.ndim > 4:
        raise ValueError(
            f"sketch is {value.dtype} {list(value.shape)}, not uint8 [H, W, 3] or [F, H, W, 3], "
            "which an array with a last axis of 3 is taken for"
        )
    # What colours mean is for the server to say, as it does of files.
    colours = value.astype(np.uint8, copy=False)
    if colours.ndim == 3:
        return pb.Media(encoded=media.encode_picture(colours, "png"))
    return pb.Media(encoded=media.encode_animation(colours, "webp"))


def _mask(value: MaskLike) -> pb.Mask:
    if isinstance(value, np.ndarray) and value.ndim != 2:
        raise ValueError(f"mask is {value.dtype} {list(value.shape)}, not uint8 [H, W] or bool")
    if isinstance(value, bytes | Path | np.ndarray):
        return pb.Mask(picture=_media(value, "mask", 1))
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"mask is of type {type(value).__name__}, not bytes, Path, an array or a list of boxes"
        )
    return pb.Mask(boxes=pb.BoxList(boxes=[_box(box, index) for index, box in enumerate(value)]))


def _box(box: Any, index: int) -> pb.Box:
    try:
        left, top, width, height = box
        return pb.Box(left=left, top=top, width=width, height=height)
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"mask: box {index}, {box!r}, is not (left, top, width, height): {error}"
        ) from error
