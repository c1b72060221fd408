"""The models that a bundle is to clients of the protocol: one for each task, with its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from nuwa.inference import grpc_service_pb2 as pb
from nuwa.inference import model_config_pb2 as config_pb
from nuwa.spec.tasks import Task

from ..core import ModelInfo
from ..errors import NotFoundError

PLATFORM = "nuwa"
VERSION = "1"
ANY = -1

TYPES = {
    "BYTES": config_pb.TYPE_STRING,
    "UINT8": config_pb.TYPE_UINT8,
    "BOOL": config_pb.TYPE_BOOL,
    "INT32": config_pb.TYPE_INT32,
}


@dataclass(frozen=True)
class TensorInfo:
    """shape: ANY where any size fits."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class TaskModel:
    """What one task takes and gives. Pictures and clips may also come as files, as BYTES [1]."""

    name: str
    task: Task
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    @property
    def metadata(self) -> pb.ModelMetadataResponse:
        message = pb.ModelMetadataResponse(name=self.name, versions=[VERSION], platform=PLATFORM)
        for tensors, added in ((self.inputs, message.inputs), (self.outputs, message.outputs)):
            for each in tensors:
                added.add(name=each.name, datatype=each.datatype, shape=each.shape)
        return message

    @property
    def config(self) -> config_pb.ModelConfig:
        """A clip has a response for each frame, which Triton calls decoupled."""
        message = config_pb.ModelConfig(name=self.name, platform=PLATFORM, backend=PLATFORM)
        for each in self.inputs:
            message.input.add(
                name=each.name,
                data_type=TYPES[each.datatype],
                dims=each.shape,
                optional=each.optional,
            )
        for each in self.outputs:
            message.output.add(name=each.name, data_type=TYPES[each.datatype], dims=each.shape)
        message.model_transaction_policy.decoupled = self.task.is_video
        return message


def models_of(info: ModelInfo) -> dict[str, TaskModel]:
    """By name, which is the bundle's and the task's."""
    models = [_model(info, task) for task in info.tasks]
    return {model.name: model for model in models}


def find(models: dict[str, TaskModel], name: str, version: str) -> TaskModel:
    """NotFoundError naming the models, or versions, that there are."""
    if name not in models:
        raise NotFoundError(f"there is no model {name!r}; this server has {', '.join(models)}")
    if version not in ("", VERSION):
        raise NotFoundError(f"model {name!r} has no version {version!r}; it has {VERSION}")
    return models[name]


def _model(info: ModelInfo, task: Task) -> TaskModel:
    size = (info.height, info.width)
    shown = (ANY, *size) if task.is_video else size
    inputs = []
    if task is not Task.I2I:
        inputs.append(TensorInfo("PROMPT", "BYTES", (1,), optional=not task.needs_text))
    if task.needs_sketch:
        inputs.append(TensorInfo("SKETCH", "UINT8", shown))
    if task.needs_frames:
        inputs.append(TensorInfo("VIDEO" if task.is_video else "IMAGE", "UINT8", (*shown, 3)))
    if task.needs_mask:
        inputs.append(TensorInfo("MASK", "BOOL", size))
    made = TensorInfo("VIDEO" if task.is_video else "IMAGE", "UINT8", (ANY, *size, 3))
    tokens = TensorInfo("TOKENS", "INT32", (ANY, ANY, ANY))
    return TaskModel(f"{info.name}_{task}", task, tuple(inputs), (made, tokens))
