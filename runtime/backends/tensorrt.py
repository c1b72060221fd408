"""A bundle's TensorRT engines, of the full TensorRT or of TensorRT-RTX; all stays on the GPU.

A step is rows put together, decoder_step, tokens put into place: recorded once for each size of a
call as a CUDA graph, so that a step costs the host one upload, one launch and one answer. Sizes
are rounded up to few. `nuwa build-engines` made the engines; they are of one architecture of GPUs,
one TensorRT and one number of slots.

Legend: C condition slots, E their entries, S cache slots, R entries a slot, d width, T rows.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa import plugins_trt
from nuwa.spec import engines
from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.engines import EngineKey, engine_file, find_engines, graphs_hash
from nuwa.spec.grid import Int
from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    SKETCH_TOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    BundleError,
    condition_outputs,
    file_hash,
)
from nuwa.spec.plan import widest_wave

from ..bundle import Bundle
from ..core import Pixels, Until
from ..errors import UnavailableError
from .base import TENSORRT, TENSORRT_RTX, CallDone, Float, Part, Stream, check_precision
from .device_memory import ALIGNMENT, CudaMemory, DeviceMemory, Recording
from .device_rows import MOST_RECORDINGS, DeviceRows, Tensor, padded
from .onnxruntime_graphs import cache_names
from .tensorrt_graph import Context, Graph

log = logging.getLogger("nuwa.runtime")

# Of caches. numpy has no bf16, which they are with fp8, too.
_STORAGE = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "fp8": np.uint16}


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A step to launch, and its context, which nothing else may run in or change."""

    recording: Recording
    context: Context


class TensorRt:
    """A backend; UnavailableError without TensorRT, cuda-python, a GPU or the kernels of rows.

    BundleError where the bundle has no engines for all that. rows, threads and spinning: ignored,
    engines say how many rows a call may have, and the CPU does next to nothing; logits: keep those
    of every step in `logits` f32 [T, K]; device_id: of the GPU; kernels: libnuwa_rows.so, the one
    that was built if None; module and memory: what stands for TensorRT and for the GPU in tests;
    recording: of steps, as CUDA graphs.
    """

    name = TENSORRT
    module = engines.MODULES[engines.TENSORRT]

    def __init__(
        self,
        bundle: Bundle,
        *,
        cache_slots: int,
        condition_slots: int,
        rows: int = 0,
        threads: int | None = None,
        spinning: bool = False,
        logits: bool = False,
        device_id: int = 0,
        kernels: Path | None = None,
        module: Any = None,
        memory: Callable[[], DeviceMemory] | None = None,
        recording: bool = True,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads} is not at least 1")
        config, manifest = bundle.manifest.config, bundle.manifest
        check_precision(self.name, manifest.precision, _STORAGE)
        self._trt = module or _imported(self.module, self.name)
        new_memory = memory or (lambda: CudaMemory(device_id))
        self._memory = new_memory()
        try:
            kernels = kernels or plugins_trt.rows()
        except FileNotFoundError as error:
            raise UnavailableError(f"{self.name} needs kernels of its own: {error}") from None
        self.bundle = bundle
        # Two cache slots a request, see Engine.
        self._folder, self._record = self._find(cache_slots // 2)
        plugins = self._record.key.plugin_abi
        self.runs_on = ", ".join(
            [
                f"{self.module} {self._trt.__version__}",
                "standard operators" if plugins is None else f"plugins {plugins}",
                f"steps {'recorded if they can be' if recording else 'not recorded'}",
            ]
        )
        self._runtime = self._trt.Runtime(_logger(self._trt))
        # Engines that later versions can run bring code for the host, which is refused by default.
        self._runtime.engine_host_code_allowed = self._record.version_compatible
        layers, width = config.decoder.layers, config.decoder.width
        self._layout, self._width = ConditionLayout.of(config), width
        self._storage = np.dtype(_STORAGE[manifest.precision])
        self._condition_names = condition_outputs(layers)
        self._conditions = self._zeros(
            self._condition_names, (condition_slots, self._layout.entries, width)
        )
        self._caches = self._zeros(
            cache_names(layers), (cache_slots, manifest.cache_entries, width)
        )
        # Threads of the engine each have graphs, memory and a stream of their own.
        preparing, painting = new_memory(), new_memory()
        self._decoder = self._graph(DECODER_STEP, self._memory)
        self._text = self._graph(TEXT_ENCODER, preparing)
        self._tokenizer = self._graph(IMAGE_TOKENIZER, preparing)
        self._detokenizer = self._graph(IMAGE_DETOKENIZER, painting)
        self._preparing = preparing
        self._ranges = self._decoder.ranges("tokens")
        _, self.most_rows = self._ranges[-1]
        if self.most_rows < (usual := cache_slots * widest_wave(config.decoder)):
            log.warning(
                "these engines take no calls of more than %d rows, and guided clips in all slots "
                "may need %d: such waves are decoded in several calls",
                self.most_rows,
                usual,
            )
        self.most_candidates = min(most for _, most in self._decoder.ranges("ranks"))
        self._rows = DeviceRows(
            self._memory,
            kernels,
            config,
            rows=self.most_rows,
            lanes=cache_slots,
            widest=self.most_candidates,
        )
        self._codebook_size = config.image.codebook_size
        self._all_logits = self._memory.allocate(4 * self.most_rows * self._codebook_size)
        self.logits: Float | None = None
        self._keep_logits = logits
        # Only plugins may write where they read: with standard operators an output that is an input
        # too may be written before all of it is read. Then the caches are copied back.
        self._copied: list[tuple[Tensor, Tensor]] = []
        written = self._caches
        if self._record.key.plugin_abi is None:
            written = self._zeros(list(written), (cache_slots, manifest.cache_entries, width))
            self._copied = list(zip(written.values(), self._caches.values(), strict=True))
        self._kept = {
            **self._caches,
            **{f"{name}_out": tensor for name, tensor in written.items()},
            **self._conditions,
        }
        # Entered around what a step launches: benchmarks time it on the GPU.
        self.launching: Callable[[], AbstractContextManager[None]] = nullcontext
        self._recording = recording
        self._recorded: dict[tuple, _Recorded | None] = {}  # the one used last at the end
        self._recorded_for = -1  # generation of the rows

    def encode_text(
        self, ids: Int, condition_slots: Sequence[int], first: int, *, busy: bool = False
    ) -> None:
        for row, slot in zip(ids, condition_slots, strict=True):
            self._encode(self._text, {"tokens": row[None]}, slot, first, (1, len(row)))

    def encode_visual(
        self,
        tokens: Int,
        coordinates: Int,
        neighbours: Int,
        condition_slot: int,
        *,
        busy: bool = False,
    ) -> None:
        inputs = {"tokens": tokens, "coordinates": coordinates, "neighbours": neighbours}
        self._encode(self._visual, inputs, condition_slot, self._layout.visual, (len(tokens),))

    def open(self, stream: Stream) -> None:
        self._rows.open(stream)

    def stage(self, stream: Stream) -> None:
        self._rows.stage(stream)

    def step(self, parts: Sequence[Part]) -> list[bool]:
        logits = self._launch(parts)
        finite = self._rows.finish()
        if self._keep_logits:
            count = sum(part.count * len(part.stream.lanes) for part in parts)
            self.logits = np.empty((count, self._codebook_size), np.float32)
            self._memory.download(logits.address, self.logits)
        return finite

    def steps(self, calls: Sequence[Sequence[Part]], until: Until) -> list[CallDone]:
        return self._rows.steps(self._launch, calls, until)

    def _launch(self, parts: Sequence[Part]) -> Tensor:
        """Puts a call into the stream; its logits, until the next one."""
        count = sum(part.count * len(part.stream.lanes) for part in parts)
        rows, profile = self._rounded(count)
        tensors = self._rows.begin(parts, rows)
        tensors["logits"] = Tensor(self._all_logits, np.float32, (rows, self._codebook_size))
        if self._recorded_for != self._rows.generation:
            self._forget()
        call = (rows, tensors["cross_neighbours"].shape[1], tensors["ranks"].shape[0])
        with self.launching():
            if not self._recording:
                self._run(tensors, self._decoder.context(profile))
            elif call not in self._recorded:
                self._recorded[call] = self._run_and_record(tensors, profile)
            else:
                recorded = self._recorded[call] = self._recorded.pop(call)
                if recorded is not None:
                    recorded.recording.launch()
                else:
                    self._run(tensors, self._decoder.context(profile))
        return tensors["logits"]

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        return self._rows.tokens(stream, first, count)

    def close(self, stream: Stream) -> None:
        self._rows.close(stream)

    def tokenize(self, pixels: Pixels, *, busy: bool = False) -> Int:
        return self._frames(self._tokenizer, "pixels", pixels, "codes", np.int32)

    def tokenize_sketch(self, class_maps: npt.NDArray[np.uint8], *, busy: bool = False) -> Int:
        return self._frames(self._sketches, "class_maps", class_maps, "codes", np.int32)

    def detokenize(self, codes: Int, *, busy: bool = False) -> Pixels:
        return self._frames(self._detokenizer, "codes", codes, "pixels", np.uint8)

    def _run(self, tensors: Mapping[str, Tensor], context: Context) -> None:
        """A step from its lanes to its tokens, in the stream."""
        self._rows.gather()
        self._decoder.enqueue({**tensors, **self._kept}, context)
        for made, cache in self._copied:
            self._memory.copy(made.address, cache.address, made.size)
        self._rows.commit()

    def _run_and_record(self, tensors: Mapping[str, Tensor], profile: int) -> _Recorded | None:
        """Runs a step; what to launch for the next ones of its size, or None, and why in the log.

        Without a context of its own it cannot be recorded: the shapes of a context must not change
        between a recording and its launch.
        """
        while len(self._recorded) >= MOST_RECORDINGS:
            self._drop(next(iter(self._recorded)))
        rows = tensors["tokens"].shape[0]
        try:
            context = self._decoder.new_context(profile)
        except MemoryError as error:
            log.warning("steps of %d rows are not recorded: %s", rows, error)
            self._run(tensors, self._decoder.context(profile))
            return None
        self._run(tensors, context)
        try:
            if not self._decoder.capturable(context):
                raise RuntimeError("TensorRT says that they cannot be")
            return _Recorded(self._memory.record(lambda: self._run(tensors, context)), context)
        except (RuntimeError, MemoryError) as error:
            log.warning("steps of %d rows are not recorded: %s", rows, error)
            return None

    def _drop(self, call: tuple) -> None:
        recorded = self._recorded.pop(call)
        if recorded is not None:
            recorded.recording.free()

    def _forget(self) -> None:
        """What was recorded reads and writes memory that is gone."""
        self._memory.wait()
        for call in list(self._recorded):
            self._drop(call)
        self._recorded_for = self._rows.generation

    def _rounded(self, rows: int) -> tuple[int, int]:
        """How many rows a call of so many gets, and the engine's profile for these."""
        if rows > self.most_rows:
            raise ValueError(
                f"a call of {rows} rows is more than the {self.most_rows} that its engine was "
                f"built for"
            )
        for profile, (low, high) in enumerate(self._ranges):
            if rows <= high:
                return max(min(padded(rows), high), low), profile
        raise AssertionError("the last range ends with the most rows")

    @cached_property
    def _visual(self) -> Graph:
        return self._graph(VISUAL_ENCODER, self._preparing)

    @cached_property
    def _sketches(self) -> Graph:
        return self._graph(SKETCH_TOKENIZER, self._preparing)

    def _graph(self, graph: str, memory: DeviceMemory) -> Graph:
        path = self._folder / engine_file(graph)
        if file_hash(path) != self._record.files.get(path.name):
            raise BundleError(f"{path} is not the file that its record names; build it again")
        return Graph(self._trt, self._runtime, path, memory)

    def _find(self, slots: int) -> tuple[Path, engines.EngineRecord]:
        """The engines for this GPU; their plugins are registered if they have some."""
        abi, library = None, None
        if self.name == TENSORRT:
            try:
                library = plugins_trt.library()
                abi = ctypes.CDLL(str(library)).nuwa_plugin_abi_version()
            except (FileNotFoundError, OSError) as error:
                log.info("only engines without plugins can be run: %s", error)
        wanted = EngineKey(
            self.name,
            engines.version_number(self._trt.__version__),
            (self._memory.target,),
            abi,
            graphs_hash(self.bundle.manifest),
            self._memory.model if self.name == TENSORRT else "",
        )
        folder, record = find_engines(self.bundle.path, wanted, slots)
        if record.key.plugin_abi is not None:
            self._register(library)
        return folder, record

    def _register(self, library: Path | None) -> None:
        """Makes the plugins known, once a process: a second time TensorRT refuses."""
        assert library is not None, "engines with plugins are found only with a library"
        if missing := plugins_trt.register(self._trt.get_plugin_registry(), library):
            raise UnavailableError(
                f"TensorRT took no {' and no '.join(missing)} from {library}; its log says why"
            )

    def _zeros(self, names: Sequence[str], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Tensors on the device by name: entries are read before they are written."""
        size = math.prod(shape) * self._storage.itemsize
        tensors = {}
        for name in names:
            address = self._memory.allocate(size)
            self._memory.clear(address, size)
            tensors[name] = Tensor(address, self._storage.type, shape)
        self._memory.wait()
        return tensors

    def _encode(
        self,
        graph: Graph,
        inputs: Mapping[str, Int],
        slot: int,
        first: int,
        rows: tuple[int, ...],
    ) -> None:
        """Runs an encoder, whose outputs [*rows, d] go into a condition slot from entry `first`."""
        tensors = graph.uploaded(inputs)
        row = self._width * self._storage.itemsize
        size, copies = math.prod(rows) * row, []
        for name in self._condition_names:
            slots, entries, _ = self._conditions[name].shape
            assert slot < slots and first + math.prod(rows) <= entries, "there is no such entry"
            address = place = self._conditions[name].address + (slot * entries + first) * row
            if address % ALIGNMENT:
                address = graph.scratch(name, size)
                copies.append((address, place))
            tensors[name] = Tensor(address, self._storage.type, (*rows, self._width))
        graph.enqueue(tensors)
        for address, place in copies:
            graph.memory.copy(address, place, size)
        graph.memory.wait()

    def _frames(
        self, graph: Graph, given: str, frames: npt.NDArray, made: str, dtype: type[np.generic]
    ) -> npt.NDArray:
        """What a graph makes of any number of frames, as many a call as its engine takes."""
        _, most = graph.ranges(given)[0]
        parts = []
        for first in range(0, len(frames), most):
            tensors = graph.uploaded({given: frames[first : first + most]})
            shape = graph.shape_of(made, tensors)
            out = np.empty(shape, dtype)
            tensors[made] = Tensor(graph.scratch(made, out.nbytes), dtype, shape)
            graph.enqueue(tensors)
            graph.memory.download(tensors[made].address, out)
            parts.append(out)
        return np.concatenate(parts)


class TensorRtRtx(TensorRt):
    """The same on TensorRT-RTX, which takes no plugins: 3DNA runs as standard operators."""

    name = TENSORRT_RTX
    module = engines.MODULES[engines.TENSORRT_RTX]


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = engines.PACKAGES[name]
        raise UnavailableError(f"{name} is not installed; pip install {package}") from None


def _logger(trt: Any) -> Any:
    """TensorRT's messages, in the log."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.log(levels.get(severity, logging.DEBUG), "TensorRT: %s", message)

    return Logger()
