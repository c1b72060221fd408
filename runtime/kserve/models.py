"""The models that bundles are to clients of the protocol: one for each task, with its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from nuwa.inference import grpc_service_pb2 as pb
from nuwa.inference import model_config_pb2 as config_pb
from nuwa.spec.tasks import Task

from ..errors import NotFoundError, NotReadyError
from ..host import Host, Loaded

PLATFORM = "nuwa"
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
    """What one task of a loaded bundle takes and gives.

    Pictures and clips may also come as files, as BYTES [1].
    """

    name: str
    versions: tuple[str, ...]
    loaded: Loaded
    task: Task
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    @property
    def metadata(self) -> pb.ModelMetadataResponse:
        message = pb.ModelMetadataResponse(
            name=self.name, versions=self.versions, platform=PLATFORM
        )
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


def models_of(host: Host) -> list[TaskModel]:
    """All there are now: for each task of each version of each bundle."""
    found = host.loaded
    versions: dict[str, list[str]] = {}
    for each in found:
        versions.setdefault(each.name, []).append(str(each.version))
    return [
        _model(each, tuple(sorted(versions[each.name], key=int)), task)
        for each in found
        for task in each.engine.info.tasks
    ]


def find(host: Host, name: str, version: str) -> TaskModel:
    """Of no version in particular, the latest. NotFoundError naming those that there are;
    NotReadyError while there are none, or its bundle is still expected.
    """
    models = models_of(host)
    if not models:
        raise NotReadyError("no model is loaded")
    named = [each for each in models if each.name == name]
    if not named:
        if any(host.expects(name.removesuffix(f"_{task}")) for task in Task):
            raise NotReadyError(f"model {name!r} is being loaded")
        names = dict.fromkeys(each.name for each in models)
        raise NotFoundError(f"there is no model {name!r}; this server has {', '.join(names)}")
    for each in named:
        if version in ("", str(each.loaded.version)):
            return each
    raise NotFoundError(
        f"model {name!r} has no version {version!r}; it has {', '.join(named[0].versions)}"
    )


def _model(loaded: Loaded, versions: tuple[str, ...], task: Task) -> TaskModel:
    info = loaded.engine.info
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
    name = f"{loaded.name}_{task}"
    return TaskModel(name, versions, loaded, task, tuple(inputs), (made, tokens))
