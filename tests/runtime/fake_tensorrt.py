"""A TensorRT whose engines are ONNX files that ONNX Runtime runs on the CPU, where its memory is.

As strict as TensorRT about shapes, profiles, alignment, and outputs in the place of inputs, which
only plugins may have; a test compares its names with those of TensorRT-RTX.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from nuwa.runtime.backends.device_memory import ALIGNMENT
from nuwa.spec.engines import (
    ENGINES,
    RECORD,
    EngineKey,
    EngineRecord,
    engine_file,
    graphs_hash,
)
from nuwa.spec.manifest import MANIFEST, Manifest, file_hash, graph_file

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}
ROWS = (1, 8, 64, 300)  # the upper ends of decoder_step's profiles
FRAMES = 3  # of a call
MEMORY = 1000  # bytes that a context needs


def with_engines(bundle: Path, runtime: str, *, slots: int, plugin_abi: int | None = None) -> Path:
    """Puts engines of a FakeTensorRt into a bundle; their folder."""
    manifest = Manifest.from_json((bundle / MANIFEST).read_text())
    key = EngineKey(runtime, FakeTensorRt.__version__, ("cpu",), plugin_abi, graphs_hash(manifest))
    folder = bundle / ENGINES / key.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for graph in manifest.graphs:
        path = folder / engine_file(graph)
        path.write_text(json.dumps({"graph": graph, "path": str(bundle / graph_file(graph))}))
        files[path.name] = file_hash(path)
    record = EngineRecord(key, slots, ROWS, False, files, "2026-11-21T00:00:00+00:00")
    (folder / RECORD).write_text(record.to_json())
    return folder


class TensorIOMode:
    INPUT, OUTPUT = "input", "output"


class ExecutionContextAllocationStrategy:
    STATIC, USER_MANAGED = "static", "user managed"


class DynamicShapesKernelSpecializationStrategy:
    LAZY, EAGER = "lazy", "eager"


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.strategy = "static"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self) -> None:
        pass


class Context:
    def __init__(self, engine: Engine, config: IRuntimeConfig | str) -> None:
        self.engine, self.lazy = engine, False
        if isinstance(config, IRuntimeConfig):
            self.lazy = config.dynamic_shapes_kernel_specialization_strategy == "lazy"
            config = config.strategy
        assert config == "user managed"
        self.memory = 0
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return 0 <= profile < self.engine.num_optimization_profiles

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= MEMORY and not address % ALIGNMENT
        self.memory = address

    def is_stream_capturable(self, stream: int) -> bool:
        return not self.lazy

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "a profile comes first"
        assert name in self.engine.inputs, name
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(least):
            return False
        self.shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names and address > 0 and not address % ALIGNMENT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of outputs, which are written as large as they come out."""
        return self.engine.output_shape(name, self.shapes)

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        missing = engine.names - self.addresses.keys()
        assert not missing, f"no address for {missing}"
        assert self.memory, "no memory to run in"
        read, written = (
            {self.addresses[name] for name in each} for each in (engine.inputs, engine.outputs)
        )
        assert not read & written, "only plugins may write where they read"
        given = {}
        for name, kind in engine.inputs.items():
            given[name] = _at(self.addresses[name], self.shapes[name], kind).copy()
        names = list(engine.outputs)
        for name, array in zip(names, engine.session.run(names, given), strict=True):
            _at(self.addresses[name], array.shape, engine.outputs[name])[...] = array
        engine.runs += 1
        return True


class Engine:
    def __init__(self, graph: str, path: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.graph, self.runs = graph, 0
        self.inputs = {each.name: TYPES[each.type] for each in self.session.get_inputs()}
        self.outputs = {each.name: TYPES[each.type] for each in self.session.get_outputs()}
        self.names = self.inputs.keys() | self.outputs.keys()

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return sorted(self.names)[index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    @property
    def num_optimization_profiles(self) -> int:
        return len(ROWS) if self.graph == "decoder_step" else 1

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        rows = (1, *(most + 1 for most in ROWS))[profile], ROWS[profile]
        sizes = {"T": rows, "B": (1, FRAMES)}
        (shape,) = [each.shape for each in self.session.get_inputs() if each.name == name]
        ranges = [sizes.get(s, (1, 10_000)) if isinstance(s, str) else (s, s) for s in shape]
        low, high = (tuple(each) for each in zip(*ranges, strict=True))
        return [low, high, high]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        assert 0 <= profile < self.num_optimization_profiles
        return MEMORY

    def create_execution_context(self, config: IRuntimeConfig | str) -> Context:
        return Context(self, config)

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        given = {each: np.zeros(shapes[each], kind) for each, kind in self.inputs.items()}
        return self.session.run([name], given)[0].shape


class Runtime:
    engine_host_code_allowed = True

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            return Engine(**json.loads(data))
        except json.JSONDecodeError:
            return None


class FakeTensorRt:
    __version__ = "10.20.0.1"
    ILogger, Runtime, TensorIOMode = ILogger, Runtime, TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy


class FakeTensorRtx(FakeTensorRt):
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy


def _at(address: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, kind).reshape(shape)
