"""One graph of a bundle as a TensorRT engine: contexts, shapes, memory of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnavailableError
from .device_memory import DeviceMemory
from .device_rows import Tensor


class Graph:
    """A graph's engine and what it runs in; for one thread."""

    def __init__(self, trt: Any, runtime: Any, path: Path, memory: DeviceMemory) -> None:
        self._trt, self._path = trt, path
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UnavailableError(f"TensorRT does not take {path}; its log says why")
        count = self._engine.num_io_tensors
        names = [self._engine.get_tensor_name(index) for index in range(count)]
        self._inputs = {
            name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        }
        self._contexts: dict[int, Context] = {}
        self._room: dict[str, tuple[int, int]] = {}  # address and size
        self.memory = memory  # the last attribute, so that contexts are gone before their memory is

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The least and the most that an input's first size may be, by profile."""
        engine, found = self._engine, []
        for profile in range(engine.num_optimization_profiles):
            least, _, most = engine.get_tensor_profile_shape(name, profile)
            found.append((least[0], most[0]))
        return found

    def uploaded(self, arrays: Mapping[str, npt.NDArray]) -> dict[str, Tensor]:
        """Inputs on the device, in memory that is theirs until the next call."""
        tensors = {}
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            address = self.scratch(name, array.nbytes)
            self.memory.upload(array, address)
            tensors[name] = Tensor(address, array.dtype.type, array.shape)
        return tensors

    def scratch(self, name: str, size: int) -> int:
        """Memory for a tensor of the calls of this graph, one after the other."""
        address, room = self._room.get(name, (0, 0))
        if size > room:
            larger = self.memory.allocate(size)
            self._room[name] = larger, size
            if room:
                self.memory.wait()
                self.memory.free(address)
            return larger
        return address

    def shape_of(self, output: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Of an output, for these inputs."""
        context = self.context()
        self._set_shapes(context, tensors)
        return tuple(context.made.get_tensor_shape(output))

    def enqueue(self, tensors: Mapping[str, Tensor], context: Context | None = None) -> None:
        """Puts a call into the stream; `tensors` are all inputs and outputs."""
        context = context or self.context()
        self._set_shapes(context, tensors)
        for name, tensor in tensors.items():
            if context.addresses.get(name) == tensor.address:
                continue
            if not context.made.set_tensor_address(name, tensor.address):
                raise RuntimeError(f"{self._path.name} takes no {name} at {tensor.address:#x}")
            context.addresses[name] = tensor.address
        if not context.made.execute_async_v3(self.memory.stream):
            self.memory.check()
            raise RuntimeError(f"{self._path.name} did not run; TensorRT's log says why")

    def capturable(self, context: Context) -> bool:
        """Whether a call, made once, can be recorded in the stream."""
        asked = getattr(context.made, "is_stream_capturable", None)
        return asked is None or bool(asked(self.memory.stream))  # all of the full TensorRT's can be

    def context(self, profile: int = 0) -> Context:
        """The profile's, for calls of any shapes that are not recorded."""
        if profile not in self._contexts:
            self._contexts[profile] = self.new_context(profile)
        return self._contexts[profile]

    def new_context(self, profile: int) -> Context:
        """For a recording, which is of use only as long as its context meets no other shapes.

        MemoryError if there is no memory for it.
        """
        made = self._created()
        if made is None:
            self.memory.check()
            raise MemoryError(f"TensorRT has no memory to run {self._path.name}")
        size = self._shared_size()
        made.set_device_memory(self.scratch("", size), size)
        if not made.set_optimization_profile_async(profile, self.memory.stream):
            self.memory.check()
            raise RuntimeError(f"{self._path.name} has no profile {profile}")
        self.memory.wait()
        return Context(made)

    def _set_shapes(self, context: Context, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._inputs or context.shapes.get(name) == tensor.shape:
                continue
            context.shapes.pop(name, None)
            if not context.made.set_input_shape(name, tensor.shape):
                shape = list(tensor.shape)
                raise ValueError(f"{self._path.name} was not built for {name} of shape {shape}")
            context.shapes[name] = tensor.shape

    def _created(self) -> Any:
        """A context without memory: all of a graph share one block, as their calls take turns."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kinds = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None:
            return self._engine.create_execution_context(strategy)
        # TensorRT-RTX compiles for the shapes that it meets; later ones would not be in recordings.
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        config.set_execution_context_allocation_strategy(strategy)
        return self._engine.create_execution_context(config)

    def _shared_size(self) -> int:
        """Bytes for a call of any profile."""
        profiles = range(self._engine.num_optimization_profiles)
        return max(self._engine.get_device_memory_size_for_profile_v2(each) for each in profiles)


@dataclass(eq=False)
class Context:
    """An execution context, and what it was told last."""

    made: Any
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
