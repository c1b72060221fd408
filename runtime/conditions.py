"""What a request of nuwa.v1 gives besides text: pictures, clips, sketches and masks, as arrays.

Says which of them a task takes and checks their sizes and numbers of frames against the model's,
those of files before they are decoded. Nothing is resized: pixels outside a mask are promised to
come back unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb

from . import media
from .core import Mask, ModelInfo, Pixels
from .errors import FieldError
from .media import Limits

Array = npt.NDArray[np.uint8]

MAX_BOXES = 256


@dataclass(frozen=True)
class Conditions:
    """As in core.GenerationRequest; None where the task does not take it."""

    frames: Pixels | None
    mask: Mask | None
    sketch: Array | None


def read(
    message: pb.GenerateImageRequest | pb.GenerateVideoRequest,
    picture_field: str,
    task: Task,
    info: ModelInfo,
    limits: Limits,
) -> Conditions:
    """The conditions of `task`; `picture_field` is "image" or "video", whichever the message has.

    FieldError if one is missing, is not for this task, cannot be read, or has the wrong size.
    """
    wanted = {
        picture_field: task.needs_frames,
        "mask": task.needs_mask,
        "sketch": task.needs_sketch,
    }
    for field, needed in wanted.items():
        if message.HasField(field) and not needed:
            raise FieldError(field, f"task {task.name} takes no {field}")
        if needed and not message.HasField(field):
            raise FieldError(field, f"{field} is missing; task {task.name} needs one")
    frames = mask = sketch = None

    def check(shape: tuple[int, ...], field: str) -> None:
        _check_frames(shape, field, task, info)

    if task.needs_frames:
        given = getattr(message, picture_field)
        frames = _samples(given, picture_field, 3, media.decode_clip, check, limits)
    if task.needs_sketch:

        def class_map(data: bytes, limits: Limits) -> Array:
            return media.decode_class_map(data, info.sketch_classes, limits)

        sketch = _samples(message.sketch, "sketch", 1, class_map, check, limits)
    if task.needs_mask:
        mask = _mask(message.mask, info, limits)
    return Conditions(frames, mask, sketch)


@contextmanager
def _blame(field: str, subject: str) -> Iterator[None]:
    """Turns a MediaError raised inside into a FieldError; its message starts with `subject`."""
    try:
        yield
    except media.MediaError as error:
        raise FieldError(field, f"{subject} {error}") from error


def _samples(
    given: pb.Media,
    field: str,
    channels: int,
    decode: Callable[[bytes, Limits], Array],
    check: Callable[[tuple[int, ...], str], None],
    limits: Limits,
) -> Array:
    """u8 [F, H, W, channels], without the last axis for one channel.

    check: FieldError if the model does not take a shape (F, H, W); of a file, asked before any of
    its frames is decoded.
    """
    match given.WhichOneof("content"):
        case "encoded":
            with _blame(f"{field}.encoded", field):
                shape = media.stated_shape(given.encoded, limits)
            check(shape, field)
            with _blame(f"{field}.encoded", field):
                samples = decode(given.encoded, limits)
        case "raw":
            samples = _raw(given.raw, f"{field}.raw", channels, limits)
        case _:
            raise FieldError(field, f"{field} has neither encoded nor raw content")
    check(samples.shape[:3], field)
    return samples


def _raw(given: pb.RawFrames, field: str, channels: int, limits: Limits) -> Array:
    for name in ("frame_count", "height", "width"):
        if getattr(given, name) < 1:
            raise FieldError(f"{field}.{name}", f"{name} {getattr(given, name)} is not at least 1")
    with _blame(field, field):
        limits.check(given.frame_count, given.height, given.width)
    shape = [given.frame_count, given.height, given.width] + [channels] * (channels > 1)
    expected = given.frame_count * given.height * given.width * channels
    if len(given.data) != expected:
        sizes = " x ".join(map(str, shape))
        raise FieldError(
            f"{field}.data", f"{field}.data is {len(given.data)} bytes; {sizes} are {expected}"
        )
    return np.frombuffer(given.data, np.uint8).reshape(shape)


def _check_frames(shape: tuple[int, ...], field: str, task: Task, info: ModelInfo) -> None:
    _check_size(shape[1:], field, info)
    frames = shape[0]
    if not task.is_video and frames != 1:
        raise FieldError(field, f"{field} has {frames} frames; task {task.name} takes one")
    if frames > info.max_frames:
        raise FieldError(
            field,
            f"{field} has {frames} frames; the model takes {info.max_frames} at most, so give "
            f"1 to {info.max_frames} of them",
        )


def _check_size(size: tuple[int, ...], field: str, info: ModelInfo) -> None:
    if size != (info.height, info.width):
        height, width = size
        raise FieldError(
            field,
            f"{field} is {width} x {height} pixels; this model takes {info.width} x {info.height}",
        )


def _mask(given: pb.Mask, info: ModelInfo, limits: Limits) -> Mask:
    match given.WhichOneof("region"):
        case "picture":
            field = "mask.picture"
            mask = _mask_picture(given.picture, field, info, limits)
        case "boxes":
            field = "mask.boxes"
            mask = _mask_boxes(given.boxes, field, info)
        case _:
            raise FieldError("mask", "mask has neither a picture nor boxes")
    return mask


def _mask_picture(given: pb.Media, field: str, info: ModelInfo, limits: Limits) -> Mask:
    def mask(data: bytes, limits: Limits) -> Array:
        return media.decode_mask(data, limits)[None].astype(np.uint8)

    def check(shape: tuple[int, ...], field: str) -> None:
        _check_size(shape[1:], field, info)

    samples = _samples(given, field, 1, mask, check, limits)
    if len(samples) != 1:
        raise FieldError(field, f"{field} has {len(samples)} frames; a mask is one picture")
    if not samples.any():
        bright = "128 or more" if given.HasField("encoded") else "not 0"
        raise FieldError(
            field,
            "the mask is dark everywhere, so nothing would be generated; bright, where to "
            f"generate, is {bright}",
        )
    return samples[0] != 0


def _mask_boxes(given: pb.BoxList, field: str, info: ModelInfo) -> Mask:
    if not given.boxes:
        raise FieldError(f"{field}.boxes", "mask.boxes has no box")
    mask = np.zeros((info.height, info.width), bool)
    for index, box in enumerate(given.boxes):
        right, bottom = box.left + box.width, box.top + box.height
        inside = 0 <= box.left < right <= info.width and 0 <= box.top < bottom <= info.height
        if not inside:
            raise FieldError(
                f"{field}.boxes[{index}]",
                f"the box from ({box.left}, {box.top}), {box.width} wide and {box.height} high, "
                f"is not inside a picture {info.width} wide and {info.height} high",
            )
        mask[box.top : bottom, box.left : right] = True
    return mask
