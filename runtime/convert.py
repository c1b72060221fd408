"""Requests of nuwa.v1 into requests of core.py; every value is checked, errors name the field.

Pure functions of the message, the model's description and the limits. `replies.py` goes the other
way. What only the engine can judge is left to `Engine.check`: how many tokens a prompt has, and the
class ids of raw sketches.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from nuwa.spec.sampling import SAMPLING_NAMES, Sampling
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb

from . import conditions, samples
from .conditions import Conditions
from .core import GenerationRequest, ModelInfo, UnsupportedTaskError
from .errors import FieldError
from .media import (
    DEFAULT_FRAMES_PER_SECOND,
    DEFAULT_LIMITS,
    MAX_FRAMES_PER_SECOND,
    MAX_SCALE,
    Limits,
)
from .samples import Samples

PREVIEWS = "preview_count"  # a field of StreamImageRequest itself
MAX_PROMPT_BYTES = 4096
MAX_REQUEST_ID_LENGTH = 128
SEED_BITS = 32  # of a seed that the server chooses
MAX_FRAME_PIXELS = 2**24  # of a frame after scaling; 48 MiB uncompressed
MAX_ANIMATION_PIXELS = 2**26  # of a clip in one file, or of all images of an answer

TASKS: dict[pb.Task, Task] = {getattr(pb, f"TASK_{task.name}"): task for task in Task}
TASK_VALUES = {task: value for value, task in TASKS.items()}
SCHEDULES = {
    pb.SCHEDULE_UNSPECIFIED: "wave",
    pb.SCHEDULE_WAVE: "wave",
    pb.SCHEDULE_RASTER: "raster",
}
PICTURE_KINDS = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "png",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_WEBP: "webp",
    pb.IMAGE_FORMAT_GIF: "gif",
    pb.IMAGE_FORMAT_RAW_RGB: "raw",
}
ANIMATION_KINDS = {
    pb.ANIMATION_FORMAT_UNSPECIFIED: None,
    pb.ANIMATION_FORMAT_WEBP: "webp",
    pb.ANIMATION_FORMAT_GIF: "gif",
}


@dataclass(frozen=True)
class OutputOptions:
    """How finished frames are to be returned. animation: "webp", "gif" or None."""

    kind: str = "png"
    scale: int = 1
    include_tokens: bool = False
    animation: str | None = None
    frames_per_second: int = DEFAULT_FRAMES_PER_SECOND


@dataclass(frozen=True)
class Job:
    """One request of the service: what to generate, how often, and how to return it."""

    generation: GenerationRequest
    output: OutputOptions
    request_id: str
    samples: Samples = field(default_factory=Samples)


def read_image_request(
    message: pb.GenerateImageRequest, info: ModelInfo, limits: Limits = DEFAULT_LIMITS
) -> Job:
    """FieldError for a bad value, UnsupportedTaskError for a task that `info` lacks."""
    refuse_unknown_fields(message)
    request_id = _request_id(message.request_id)
    task = _task(message.task, info, video=False)
    prompt = _prompt(message.prompt, task)
    given = conditions.read(message, "image", task, info, limits)
    output = _output(message.output, info)
    generation = _generation(message, task, prompt, 1, given, info)
    wanted = samples.read(message, generation, info)
    pixels = wanted.returned * info.height * info.width * output.scale**2
    _limit_pixels("the returned images", pixels, MAX_ANIMATION_PIXELS)
    return Job(generation, output, request_id, wanted)


def read_stream_image_request(
    message: pb.StreamImageRequest, info: ModelInfo, limits: Limits = DEFAULT_LIMITS
) -> Job:
    """As read_image_request, with previews. Fields of errors are those of message.image."""
    refuse_unknown_fields(message)
    job = read_image_request(message.image, info, limits)
    with blame(PREVIEWS):
        generation = replace(job.generation, previews=message.preview_count)
    samples.read(message.image, generation, info)  # previews take memory too
    return replace(job, generation=generation)


def read_video_request(
    message: pb.GenerateVideoRequest, info: ModelInfo, limits: Limits = DEFAULT_LIMITS
) -> Job:
    """FieldError for a bad value, UnsupportedTaskError for a task that `info` lacks."""
    refuse_unknown_fields(message)
    request_id = _request_id(message.request_id)
    task = _task(message.task, info, video=True)
    prompt = _prompt(message.prompt, task)
    given = conditions.read(message, "video", task, info, limits)
    frame_count = _frame_count(message, task, info, given)
    output = _clip_output(message, info, frame_count)
    generation = _generation(message, task, prompt, frame_count, given, info)
    wanted = samples.read(message, generation, info)
    return Job(generation, output, request_id, wanted)


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """FieldError if `message` holds what this version does not know: ignoring it would mislead."""
    if unknown := UnknownFieldSet(message):
        field = f"field number {unknown[0].field_number} of {message.DESCRIPTOR.full_name}"
        raise FieldError(
            path, f"{field} is not known to this server, which may be older than the client"
        )
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        inner = f"{path}.{descriptor.name}" if path else descriptor.name
        if not descriptor.is_repeated:
            refuse_unknown_fields(value, inner)
            continue
        if descriptor.message_type.GetOptions().map_entry:
            if descriptor.message_type.fields_by_name["value"].message_type is not None:
                for key in value:
                    refuse_unknown_fields(value[key], f"{inner}.{key}")
            continue
        if len(value) > conditions.MAX_BOXES:
            raise FieldError(inner, f"{inner} has {len(value)} items, more than any list may")
        for item in value:
            refuse_unknown_fields(item, inner)


def stated(message: pb.Sampling) -> dict[str, Any]:
    """Values by name of what `message` says of core.Sampling's fields; unset ones are left out."""
    return {name: getattr(message, name) for name in SAMPLING_NAMES if message.HasField(name)}


@contextmanager
def blame(field: str) -> Iterator[None]:
    """Turns a ValueError raised inside into a FieldError of `field`."""
    try:
        yield
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(field, str(error)) from error


@contextmanager
def inside(field: str) -> Iterator[None]:
    """FieldErrors raised inside are of fields of the message `field`, but for those of PREVIEWS."""
    try:
        yield
    except FieldError as error:
        if error.field == PREVIEWS:
            raise
        path = f"{field}.{error.field}" if error.field else field
        raise FieldError(path, str(error)) from error


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID_LENGTH or not (given.isascii() and given.isprintable()):
        raise FieldError(
            "request_id",
            f"request_id is not at most {MAX_REQUEST_ID_LENGTH} printable ASCII characters",
        )
    return given or str(uuid.uuid4())


def _task(value: pb.Task, info: ModelInfo, *, video: bool) -> Task:
    if value not in TASKS:
        wanted = ", ".join(task.name for task in Task if task.is_video == video)
        problem = f"task {value} is unknown" if value else "task is not set"
        raise FieldError("task", f"{problem}; choose one of {wanted}")
    task = TASKS[value]
    if task.is_video != video:
        method = "GenerateVideo" if task.is_video else "GenerateImage"
        raise FieldError("task", f"task {task.name} is for {method}")
    if task not in info.tasks:
        able = ", ".join(each.name for each in info.tasks)
        raise UnsupportedTaskError(
            f"this bundle cannot do {task.name}; it can do {able}", info.tasks
        )
    return task


def _prompt(text: str, task: Task) -> str:
    size = len(text.encode())
    if size > MAX_PROMPT_BYTES:
        raise FieldError(
            "prompt", f"prompt is {size} bytes of UTF-8; the limit is {MAX_PROMPT_BYTES}"
        )
    if task.needs_text and not text.strip():
        raise FieldError("prompt", f"prompt is empty; task {task.name} needs one")
    if task is Task.I2I and text:
        raise FieldError("prompt", "task I2I takes no prompt; TI2I does")
    return text


def _frame_count(
    message: pb.GenerateVideoRequest, task: Task, info: ModelInfo, given: Conditions
) -> int:
    most = info.max_predicted_frames if task is Task.V2V else info.max_frames
    follows = given.sketch if task is Task.S2V else given.frames if task is Task.TV2V else None
    if message.HasField("frame_count"):
        count = message.frame_count
    else:
        count = info.max_frames if follows is None else len(follows)
    if not 1 <= count <= most:
        raise FieldError("frame_count", f"frame_count {count} is not in [1, {most}]")
    if follows is not None and len(follows) != count:
        name = "sketch" if task is Task.S2V else "video"
        raise FieldError(
            "frame_count", f"frame_count is {count}, but the {name} has {len(follows)} frames"
        )
    if task is Task.V2V and given.frames is not None and len(given.frames) >= count:
        frames = len(given.frames)
        choices = [f"give at most {count - 1}"] if count > 1 else []
        if frames < most:
            choices.append(f"a frame_count of {frames + 1} to {most}")
        raise FieldError(
            "video",
            f"video has {frames} frames, which leaves none of {count} to predict; "
            + ", or ".join(choices),
        )
    return count


def _generation(
    message: pb.GenerateImageRequest | pb.GenerateVideoRequest,
    task: Task,
    prompt: str,
    frame_count: int,
    given: Conditions,
    info: ModelInfo,
) -> GenerationRequest:
    sampling = message.sampling
    if message.schedule not in SCHEDULES:
        raise FieldError("schedule", f"schedule {message.schedule} is unknown")
    if sampling.sample_index < 0:
        raise FieldError(
            "sampling.sample_index", f"sample_index {sampling.sample_index} is negative"
        )
    knobs = _sampling(sampling, info.sampling.get(task, Sampling()))
    with blame("sampling.seed"):
        return GenerationRequest(
            task=task,
            prompt=prompt,
            frame_count=frame_count,
            seed=sampling.seed if sampling.HasField("seed") else _free_seed(message.request_id),
            sample_index=sampling.sample_index,
            sampling=knobs,
            frames=given.frames,
            mask=given.mask,
            sketch=given.sketch,
            schedule=SCHEDULES[message.schedule],
        )


def _free_seed(request_id: str) -> int:
    """Of a request without a seed. Sent again it has the same one, even to another server."""
    if not request_id:
        return secrets.randbits(SEED_BITS)
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[: SEED_BITS // 8], "little")


def _sampling(message: pb.Sampling, default: Sampling) -> Sampling:
    values = stated(message)
    for name, value in values.items():
        with blame(f"sampling.{name}"):
            Sampling(**{name: value})
    return replace(default, **values)


def _output(message: pb.Output, info: ModelInfo) -> OutputOptions:
    scale = message.scale_factor if message.HasField("scale_factor") else 1
    if message.format not in PICTURE_KINDS:
        raise FieldError("output.format", f"output.format {message.format} is unknown")
    if not 1 <= scale <= MAX_SCALE:
        raise FieldError("output.scale_factor", f"scale_factor {scale} is not in [1, {MAX_SCALE}]")
    _limit_pixels("a frame", info.height * info.width * scale**2, MAX_FRAME_PIXELS)
    return OutputOptions(PICTURE_KINDS[message.format], scale, message.include_tokens)


def _clip_output(
    message: pb.GenerateVideoRequest, info: ModelInfo, frame_count: int
) -> OutputOptions:
    output = _output(message.output, info)
    if message.animation_format not in ANIMATION_KINDS:
        raise FieldError(
            "animation_format", f"animation_format {message.animation_format} is unknown"
        )
    animation = ANIMATION_KINDS[message.animation_format]
    speed = DEFAULT_FRAMES_PER_SECOND
    if message.HasField("frames_per_second"):
        speed = message.frames_per_second
        if animation is None:
            raise FieldError("frames_per_second", "frames_per_second needs an animation_format")
    if not 1 <= speed <= MAX_FRAMES_PER_SECOND:
        raise FieldError(
            "frames_per_second", f"frames_per_second {speed} is not in [1, {MAX_FRAMES_PER_SECOND}]"
        )
    if animation:  # of one sample
        pixels = frame_count * info.height * info.width * output.scale**2
        _limit_pixels("the animation", pixels, MAX_ANIMATION_PIXELS)
    return replace(output, animation=animation, frames_per_second=speed)


def _limit_pixels(what: str, pixels: int, limit: int) -> None:
    if pixels > limit:
        raise FieldError(
            "output.scale_factor", f"{what} would have {pixels} pixels; the limit is {limit}"
        )
