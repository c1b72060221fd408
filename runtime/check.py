"""Whether a request makes sense for a model: everything that would fail later is refused here.

Pure functions of the request and the model's description; error fields are named as in
proto/nuwa/v1/generation.proto. Values that GenerationRequest and Sampling judge themselves are not
judged again.
"""

from __future__ import annotations

import numpy as np

from nuwa.spec.sampling import Sampling, sort_width
from nuwa.spec.tasks import Task

from .class_maps import ClassMaps, check_ids
from .core import GenerationRequest, ModelInfo, UnsupportedTaskError
from .errors import FieldError

MAX_SAMPLE_INDEX = 2**32 - 1


def check_request(request: GenerationRequest, info: ModelInfo) -> None:
    """UnsupportedTaskError, or FieldError (a ValueError) that names the field and what is right."""
    task = request.task
    if task not in info.tasks:
        able = ", ".join(each.name for each in info.tasks)
        raise UnsupportedTaskError(
            f"this bundle cannot do {task.name}; it can do {able}", info.tasks
        )
    if not 0 <= request.sample_index <= MAX_SAMPLE_INDEX:
        raise FieldError(
            "sampling.sample_index",
            f"sample_index {request.sample_index} is not in [0, {MAX_SAMPLE_INDEX}]",
        )
    _check_prompt(request)
    _check_frame_count(request, info)
    _check_presence(request)
    if request.frames is not None:
        _check_frames(request, info)
    if request.mask is not None:
        _check_mask(request, info)
    if request.sketch is not None:
        _check_sketch(request.sketch, request, info)


def check_candidates(sampling: Sampling, codebook_size: int, most: int | None) -> None:
    """FieldError where more codes would have to be sorted than the backend can; most: None, all."""
    needed = sort_width([sampling.top_k], [sampling.top_p], codebook_size)
    if most is None or needed <= most:
        return
    field, value = ("top_k", sampling.top_k) if sampling.top_k else ("top_p", sampling.top_p)
    choices = f"a top_k of 1 to {most}"
    raise FieldError(
        f"sampling.{field}",
        f"{field} {value} chooses among {needed} codes, and this server's backend can sort {most}: "
        + (f"give {choices}" if sampling.top_k else f"give {choices} with it, or top_p 1"),
    )


def _check_prompt(request: GenerationRequest) -> None:
    task = request.task
    if task.needs_text and not request.prompt.strip():
        raise FieldError("prompt", f"prompt is empty; task {task.name} needs one")
    if task is Task.I2I and request.prompt:
        raise FieldError("prompt", "task I2I takes no prompt; TI2I does")


def _check_frame_count(request: GenerationRequest, info: ModelInfo) -> None:
    count, task, reason = request.frame_count, request.task, "an image is 1"
    most = info.max_frames if task.is_video else 1
    if task.is_video:
        reason = f"this model makes 1 to {most}"
    if task is Task.V2V:  # goes on beyond the trained length
        most = info.max_predicted_frames
        reason = f"task V2V makes 1 to {most}"
    if count > most:
        raise FieldError("frame_count", f"frame_count {count} is too large; {reason}")


def _check_presence(request: GenerationRequest) -> None:
    task = request.task
    for field, value, needed in (
        (_frames_field(task), request.frames, task.needs_frames),
        ("mask", request.mask, task.needs_mask),
        ("sketch", request.sketch, task.needs_sketch),
    ):
        if needed and value is None:
            raise FieldError(field, f"{field} is missing; task {task.name} needs one")
        if value is not None and not needed:
            raise FieldError(field, f"task {task.name} takes no {field}")


def _check_frames(request: GenerationRequest, info: ModelInfo) -> None:
    field, frames, task = _frames_field(request.task), request.frames, request.task
    assert frames is not None, "only called for requests with frames"
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise FieldError(
            field, f"{field} is {frames.dtype} {list(frames.shape)}, not uint8 [F, H, W, 3]"
        )
    _check_size(field, frames.shape[1:3], info)
    given, count = len(frames), request.frame_count
    if task is Task.V2V and not 1 <= given < count:
        raise FieldError(
            field,
            f"video has {given} frames; V2V needs at least 1 and fewer than the {count} asked",
        )
    if task is Task.V2V and given > info.max_frames:
        raise FieldError(
            field, f"video has {given} frames; this model takes 1 to {info.max_frames} of a clip"
        )
    if task is not Task.V2V and given != count:
        raise FieldError(field, f"{field} has {given} frames, not the {count} asked for")


def _check_mask(request: GenerationRequest, info: ModelInfo) -> None:
    mask = request.mask
    assert mask is not None, "only called for requests with a mask"
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise FieldError("mask", f"mask is {mask.dtype} {list(mask.shape)}, not bool [H, W]")
    _check_size("mask", mask.shape, info)
    if not mask.any():
        raise FieldError("mask", "mask is False everywhere, so nothing would be generated")


def _check_sketch(sketch: ClassMaps, request: GenerationRequest, info: ModelInfo) -> None:
    if sketch.dtype != np.uint8 or sketch.ndim != 3:
        raise FieldError(
            "sketch", f"sketch is {sketch.dtype} {list(sketch.shape)}, not uint8 [F, H, W]"
        )
    _check_size("sketch", sketch.shape[1:], info)
    if len(sketch) != request.frame_count:
        raise FieldError(
            "sketch", f"sketch has {len(sketch)} frames, not the {request.frame_count} asked for"
        )
    try:
        check_ids(sketch, info.sketch_classes)
    except ValueError as error:
        raise FieldError("sketch", f"sketch {error}") from error


def _check_size(field: str, size: tuple[int, ...], info: ModelInfo) -> None:
    if size != (info.height, info.width):
        height, width = size
        raise FieldError(
            field,
            f"{field} is {width} x {height} pixels; this model takes {info.width} x {info.height}",
        )


def _frames_field(task: Task) -> str:
    return "video" if task.is_video else "image"
