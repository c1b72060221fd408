"""A TensorRT whose engines are ONNX files that ONNX Runtime runs on the CPU, where its memory is.

As strict as TensorRT about shapes, profiles, alignment, outputs in the place of inputs, which only
plugins may have, and recordings, whose contexts must stay as they were; a test compares its names
with those of TensorRT and of TensorRT-RTX.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import json
import shutil
import subprocess
import tempfile
import types
import weakref
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from nuwa.runtime.backends.device_memory import ALIGNMENT, HostMemory
from nuwa.spec.engines import (
    ENGINES,
    RECORD,
    TENSORRT,
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
SORTED = 10_000  # the most candidates
MEMORY = 1000  # bytes that a context needs
PLUGIN_ABI = 7

_streams = itertools.count(1)
_memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


class Memory(HostMemory):
    """One that engines find by its stream, in which they put their work."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = next(_streams)
        _memories[self.stream] = self

    @property
    def recording(self) -> bool:
        return self._recorded is not None


@functools.cache
def plugin_library() -> Path:
    """A library that says which version of the plugins it is, and no more."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang", "c++", "g++")), None)
    if compiler is None:
        pytest.skip("no C compiler")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, library = folder / "plugins.c", folder / "libplugins.so"
    source.write_text(f"int nuwa_plugin_abi_version(void) {{ return {PLUGIN_ABI}; }}\n")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True, timeout=60)
    return library


def with_engines(bundle: Path, runtime: str, *, slots: int, plugin_abi: int | None = None) -> Path:
    """Puts engines of a FakeTensorRt into a bundle; their folder."""
    manifest = Manifest.from_json((bundle / MANIFEST).read_text())
    gpu = HostMemory.model if runtime == TENSORRT else ""
    hashes = graphs_hash(manifest)
    key = EngineKey(runtime, FakeTensorRt.__version__, ("cpu",), plugin_abi, hashes, gpu)
    folder = bundle / ENGINES / key.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for graph in manifest.graphs:
        path = folder / engine_file(graph)
        path.write_text(
            json.dumps(
                {
                    "graph": graph,
                    "path": str(bundle / graph_file(graph)),
                    "plugins": plugin_abi is not None,
                }
            )
        )
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
        self._changes = 0
        self._run_at = -1  # how many changes there were when it last ran

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._changes += 1
        self.profile = profile
        return 0 <= profile < self.engine.num_optimization_profiles

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= MEMORY and not address % ALIGNMENT
        self._changes += 1
        self.memory = address

    def is_stream_capturable(self, stream: int) -> bool:
        return not self.lazy

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "a profile comes first"
        assert name in self.engine.inputs, name
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(least):
            return False
        self._changes += 1
        self.shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._changes += 1
        self.addresses[name] = address
        return name in self.engine.names and address > 0 and not address % ALIGNMENT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of outputs, which are written as large as they come out."""
        return self.engine.output_shape(name, self.shapes)

    def execute_async_v3(self, stream: int) -> bool:
        """Puts a call into the stream; one that is recorded was made before."""
        memory, changes = _memories[stream], self._changes
        assert not memory.recording or self._run_at == changes, "it has not run like this before"

        def work() -> None:
            assert self._changes == changes, "its context has changed since it was recorded"
            self._run_at = changes
            self._execute()

        memory.put(work)
        return True

    def _execute(self) -> None:
        engine, addresses = self.engine, self.addresses
        missing = engine.names - addresses.keys()
        assert not missing, f"no address for {missing}"
        assert self.memory, "no memory to run in"
        read, written = (
            {addresses[name] for name in each} for each in (engine.inputs, engine.outputs)
        )
        aliased = [name for name in engine.inputs if f"{name}_out" in engine.outputs]
        for name in aliased if engine.plugins else []:
            assert addresses[name] == addresses[f"{name}_out"], (
                f"{name} is written where it is read"
            )
        shared = {addresses[name] for name in aliased} if engine.plugins else set()
        assert read & written == shared, "only plugins may write where they read"
        given = {}
        for name, kind in engine.inputs.items():
            given[name] = _at(addresses[name], self.shapes[name], kind).copy()
        names = list(engine.outputs)
        for name, array in zip(names, engine.session.run(names, given), strict=True):
            _at(addresses[name], array.shape, engine.outputs[name])[...] = array
        engine.runs += 1


class Engine:
    def __init__(self, graph: str, path: str, plugins: bool) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.graph, self.plugins, self.runs = graph, plugins, 0
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
        sizes = {"T": rows, "B": (1, FRAMES), "W": (1, SORTED)}
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


class IPluginRegistry:
    """As of one process; `loaded` are the libraries."""

    def __init__(self) -> None:
        self.all_creators = [types.SimpleNamespace(name="ROIAlign_TRT", plugin_namespace="")]
        self.loaded: list[str] = []

    def load_library(self, path: str) -> None:
        assert Path(path) == plugin_library()
        assert path not in self.loaded, "TensorRT refuses what it has"
        self.loaded.append(path)
        for name in ("NearbyAttention", "CachedNearbyAttention"):
            self.all_creators.append(types.SimpleNamespace(name=name, plugin_namespace="nuwa"))


REGISTRY = IPluginRegistry()


class FakeTensorRt:
    __version__ = "10.20.0.1"
    ILogger, Runtime, TensorIOMode = ILogger, Runtime, TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    @staticmethod
    def get_plugin_registry() -> IPluginRegistry:
        return REGISTRY


class FakeTensorRtx(FakeTensorRt):
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy


def _at(address: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, kind).reshape(shape)
