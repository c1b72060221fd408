"""What requests say: a ModelInferRequest as a Job, by way of the message of nuwa.v1 that asks for
the same, so that both interfaces have the same checks and defaults; and what others may not say.

Errors name tensors and parameters.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nuwa.inference import grpc_service_pb2 as pb
from nuwa.v1 import generation_pb2 as v1

from .. import convert
from ..convert import Job, refuse_unknown_fields
from ..core import ModelInfo
from ..errors import FieldError
from ..host import SEPARATOR
from ..media import Limits
from .models import TaskModel
from .tensors import Tensor, read_inputs

MICROSECONDS = 1e6
SCHEDULES = {"wave": v1.SCHEDULE_WAVE, "raster": v1.SCHEDULE_RASTER}
# Parameters by name: what kind of value, and the field of nuwa.v1's request.
SHARED = {
    "seed": (int, "sampling.seed"),
    "sample_index": (int, "sampling.sample_index"),
    "temperature": (float, "sampling.temperature"),
    "top_k": (int, "sampling.top_k"),
    "top_p": (float, "sampling.top_p"),
    "guidance_scale": (float, "sampling.guidance_scale"),
    "sample_count": (int, "sample_count"),
    "return_count": (int, "return_count"),
    "rank_by": (str, "rank_by"),
    "schedule": (str, "schedule"),
}
OF_CLIPS = {"frame_count": (int, "frame_count")}
TIMEOUT = "timeout"  # microseconds, as Triton's clients send it
EMPTY_FINAL = "triton_enable_empty_final_response"
DEPENDENTS = "unload_dependents"  # which Triton's client always sends
TENSORS = {"prompt": "PROMPT", "sketch": "SKETCH", "image": "IMAGE", "video": "VIDEO"}


@dataclass(frozen=True)
class InferJob:
    """timeout: seconds, None for none; tokens: whether TOKENS are asked for; empty_final: whether
    the end of a stream's answer is to be told by a response of its own.
    """

    job: Job
    timeout: float | None
    tokens: bool
    empty_final: bool


def check_index(request: pb.RepositoryIndexRequest) -> None:
    """FieldError for a repository, of which there are none."""
    refuse_unknown_fields(request)
    _refuse_repository(request)


def check_load(request: pb.RepositoryModelLoadRequest) -> None:
    """FieldError for whatever would have a bundle be loaded otherwise than it is."""
    refuse_unknown_fields(request)
    _refuse_repository(request)
    _check_name(request, "loaded")
    if SEPARATOR in request.model_name:
        name = request.model_name
        raise FieldError("model_name", f"model_name {name!r} has a version; give it without")
    for name in request.parameters:
        raise FieldError(
            f"parameters.{name}",
            f"a bundle is loaded as it is; loading takes no parameters, and {name!r} is one",
        )


def check_unload(request: pb.RepositoryModelUnloadRequest) -> None:
    """FieldError without a name, and for all parameters but DEPENDENTS, of which there are none: so
    both its values mean the same.
    """
    refuse_unknown_fields(request)
    _refuse_repository(request)
    _check_name(request, "taken away")
    for name, parameter in request.parameters.items():
        field = f"parameters.{name}"
        if name != DEPENDENTS:
            raise FieldError(field, f"unloading has no parameter {name!r}; it has {DEPENDENTS}")
        _typed(_value(parameter, field), bool, field)


def _refuse_repository(request: Any) -> None:
    if request.repository_name:
        raise FieldError(
            "repository_name",
            f"there is no repository {request.repository_name!r}, nor any other; leave it empty",
        )


def _check_name(request: Any, done: str) -> None:
    """FieldError for none: the default model of nuwa.v1 is nothing that this protocol knows."""
    if not request.model_name:
        raise FieldError("model_name", f"model_name is empty; say which model is to be {done}")


def read_request(
    request: pb.ModelInferRequest, model: TaskModel, info: ModelInfo, limits: Limits
) -> InferJob:
    """FieldError for a tensor or parameter that is missing, wrong or unknown."""
    refuse_unknown_fields(request)
    inputs = read_inputs(request)
    by_name = {each.name: each for each in model.inputs}
    for name in inputs:
        if name not in by_name:
            raise FieldError(
                f"inputs.{name}", f"{model.name} has no input {name!r}; it takes {_list(by_name)}"
            )
    wanted = _outputs(request, model)
    video = model.task.is_video
    message = v1.GenerateVideoRequest() if video else v1.GenerateImageRequest()
    message.request_id, message.task = request.id, convert.TASK_VALUES[model.task]
    # An id there makes a call one to answer again with the same. Here it is what clients tell
    # answers apart by, who often count from 0 in every session.
    message.sampling.seed = secrets.randbits(convert.SEED_BITS)
    message.output.format = v1.IMAGE_FORMAT_RAW_RGB
    message.output.include_tokens = "TOKENS" in wanted
    for name, tensor in inputs.items():
        _fill(message, name, tensor)
    timeout, empty_final = _parameters(request, message, model)
    with renamed():
        read: Callable = convert.read_video_request if video else convert.read_image_request
        job = read(message, info, limits)
    return InferJob(job, timeout, "TOKENS" in wanted, empty_final)


def _outputs(request: pb.ModelInferRequest, model: TaskModel) -> list[str]:
    names = [each.name for each in model.outputs]
    if len(request.outputs) > len(names):
        raise FieldError(
            "outputs",
            f"{len(request.outputs)} outputs are asked for; {model.name} has {len(names)}",
        )
    for asked in request.outputs:
        if asked.name not in names:
            raise FieldError(
                f"outputs.{asked.name}",
                f"{model.name} has no output {asked.name!r}; it gives {_list(names)}",
            )
        for name in asked.parameters:
            raise FieldError(
                f"outputs.{asked.name}.parameters.{name}",
                f"outputs take no parameters, such as shared memory; {name!r} is one",
            )
    return [asked.name for asked in request.outputs]


def _fill(message: Any, name: str, tensor: Tensor) -> None:
    field = f"inputs.{name}"
    if name == "PROMPT":
        if tensor.datatype != "BYTES" or len(tensor.elements) != 1:
            raise FieldError(field, "PROMPT is one element of BYTES: a text as UTF-8")
        try:
            message.prompt = tensor.elements[0].decode()
        except UnicodeDecodeError:
            raise FieldError(field, "PROMPT is not valid UTF-8") from None
        return
    media = {
        "SKETCH": lambda: message.sketch,
        "IMAGE": lambda: message.image,
        "VIDEO": lambda: message.video,
        "MASK": lambda: message.mask.picture,
    }[name]()
    if tensor.datatype == "BYTES":
        if len(tensor.elements) != 1:
            raise FieldError(field, f"{name} as BYTES is one element: a file")
        media.encoded = tensor.elements[0]
        return
    channels = 3 if name in ("IMAGE", "VIDEO") else 1
    sizes = tensor.shape
    if channels == 3:
        if sizes[-1:] != (3,):
            raise FieldError(field, f"{name} has the shape {list(sizes)}; its last size is 3")
        sizes = sizes[:-1]
    if len(sizes) not in (2, 3):
        raise FieldError(
            field, f"{name} has the shape {list(tensor.shape)}; see the model's metadata"
        )
    frames, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    media.raw.data = tensor.data
    media.raw.frame_count, media.raw.height, media.raw.width = frames, height, width


def _parameters(
    request: pb.ModelInferRequest, message: Any, model: TaskModel
) -> tuple[float | None, bool]:
    known = SHARED | (OF_CLIPS if model.task.is_video else {})
    timeout, empty_final = None, False
    for name, parameter in request.parameters.items():
        field = f"parameters.{name}"
        value = _value(parameter, field)
        if name == TIMEOUT:
            timeout = _typed(value, int, field) / MICROSECONDS
            if timeout <= 0:
                raise FieldError(field, f"timeout {value} is not above 0; it is in microseconds")
        elif name == EMPTY_FINAL:
            empty_final = _typed(value, bool, field)
        elif name not in known:
            raise FieldError(
                field,
                f"{model.name} has no parameter {name!r}; it has {_list([*known, TIMEOUT])}",
            )
        else:
            kind, path = known[name]
            _set(message, path, _typed(value, kind, field), field)
    return timeout, empty_final


def _value(parameter: pb.InferParameter | pb.ModelRepositoryParameter, field: str) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise FieldError(field, "the parameter has no value")
    return getattr(parameter, kind)


def _typed(value: Any, kind: type, field: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise FieldError(field, f"the value {value!r} is not of type {kind.__name__}")
    return value


def _set(message: Any, path: str, value: Any, field: str) -> None:
    *groups, name = path.split(".")
    for group in groups:
        message = getattr(message, group)
    if name == "schedule":
        if value not in SCHEDULES:
            raise FieldError(field, f"schedule {value!r} is not one of {_list(SCHEDULES)}")
        value = SCHEDULES[value]
    try:
        setattr(message, name, value)
    except ValueError:
        raise FieldError(field, f"the value {value} is too large") from None


@contextmanager
def renamed() -> Iterator[None]:
    """FieldErrors raised inside name tensors, parameters and fields of this protocol, not those of
    nuwa.v1.
    """
    try:
        yield
    except FieldError as error:
        path = error.field
        for name, (_, field) in {**SHARED, **OF_CLIPS}.items():
            if path == field:
                raise FieldError(f"parameters.{name}", str(error)) from error
        first = path.split(".")[0]
        name = TENSORS.get(first, first.upper() if first == "mask" else "")
        where = {"request_id": "id", "model": "model_name"}.get(path, path)
        raise FieldError(f"inputs.{name}" if name else where, str(error)) from error


def _list(names: Any) -> str:
    return ", ".join(names)
