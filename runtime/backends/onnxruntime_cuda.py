"""A bundle's graphs on ONNX Runtime's CUDA provider; caches and condition slots stay on the GPU.

Encoders write into the condition slots where they are, and a step updates the caches in place. 3DNA
runs as the kernels of plugins_trt where these are built and the model's heads have a size for them,
else as the function bodies of the graphs. Tokens and staged rows stay on the GPU too where the
kernels for that are built and cuda-python is installed; else a step sends the indices of its rows
up, some hundred bytes a row, and brings their tokens back.

Legend: C condition slots, E their entries, S cache slots, R entries a slot, d width.
"""

from __future__ import annotations

import ctypes
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nuwa import plugins_trt
from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Int
from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    SKETCH_TOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    condition_outputs,
    step_call_inputs,
)

from ..bundle import Bundle
from ..core import Pixels, Until
from ..errors import DeviceLostError, UnavailableError
from .base import (
    ONNXRUNTIME_CUDA,
    CallDone,
    Float,
    Part,
    Stream,
    check_precision,
    steps_in_turn,
)
from .device_memory import STICKY, CudaMemory, DeviceMemory, HostMemory
from .device_rows import DeviceRows
from .host_tokens import HostTokens
from .onnxruntime_graphs import cache_names
from .onnxruntime_step import DeviceStep
from .step_batch import CrossColumns, StepBatch, assemble

log = logging.getLogger("nuwa.runtime")

_Place = tuple[str, int, Any, Sequence[int], int]  # device, its index, type, shape, address

_HEAD_DIMS, _MOST_NEIGHBOURS = (32, 64, 128), 8192  # of the kernels
_STORAGE = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # numpy has no bf16
_BF16 = 16  # onnx.TensorProto.BFLOAT16, which bindings take in place of numpy's types
_CUDA = "CUDAExecutionProvider"
# How ONNX Runtime tells of a call of CUDA that failed: its cuda_call.cc by number, its kernels by
# name; ours do as these.
_LOST = re.compile(
    rf"\bCUDA (?:failure (?:{'|'.join(map(str, STICKY.values()))})|error (?:{'|'.join(STICKY)})):"
)
# Before, a recorded step is launched with what is no longer there: GatherND (in bundles of before
# November 2026) and CudaAsyncBuffer (Concat of unequal sizes in the function bodies, ScatterND)
# are recorded with copies from memory of the host that is freed once they are
# (microsoft/onnxruntime#32120, #32121). The libraries of the wheels say who has the corrections:
# onnxruntime-gpu 1.29.0 neither, 1.30.0 the second, 1.31.1 both (from which 1.31.0 differs, by the
# release notes, in builds with OpenVINO only).
_RECORDING_SINCE = (1, 31)


class OnnxRuntimeCuda:
    """A backend; UnavailableError where there is no such provider, and for an int8 bundle.

    rows: of usual calls, ONNX Runtime makes room as calls come; threads and spinning: of what the
    provider leaves to the CPU; logits: keep the logits of every step in `logits` f32 [T, K];
    device: "cpu" runs the same on the CPU provider, which tests do; device_id: of the GPU; kernels:
    libnuwa_rows.so, the one that was built if None; recording: of steps, as CUDA graphs, where all
    of a step is on the device; memory: what stands for the GPU's in tests.
    """

    name = ONNXRUNTIME_CUDA
    most_rows: int | None = None
    most_candidates: int | None = None

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
        device: str = "cuda",
        device_id: int = 0,
        kernels: Path | None = None,
        recording: bool = True,
        memory: Callable[[], DeviceMemory] | None = None,
    ) -> None:
        config, manifest = bundle.manifest.config, bundle.manifest
        check_precision(self.name, manifest.precision, _STORAGE)
        if device == "cuda" and _CUDA not in ort.get_available_providers():
            raise UnavailableError(
                f"{self.name} needs ONNX Runtime with CUDA: install onnxruntime-gpu in place of "
                f"onnxruntime"
            )
        if device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA's libraries that pip installed
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads} is not at least 1")
        self.bundle, self.device, self.device_id = bundle, device, device_id
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads or 0
        self._options.add_session_config_entry(
            "session.intra_op.allow_spinning", str(int(spinning))
        )
        self._options.log_severity_level = 3  # errors
        library = _operators(config, device_id) if device == "cuda" else None
        if library:
            self._options.register_custom_ops_library(str(library))
        self._storage = np.dtype(_STORAGE[manifest.precision])
        self._element = _BF16 if manifest.precision == "bf16" else self._storage.type
        layers, width = config.decoder.layers, config.decoder.width
        entries = ConditionLayout.of(config).entries
        self._first_visual = ConditionLayout.of(config).visual
        self._condition_names = condition_outputs(layers)
        self._text = self._session(TEXT_ENCODER)
        self._tokenizer = self._session(IMAGE_TOKENIZER)
        self._detokenizer = self._session(IMAGE_DETOKENIZER)
        kept = self._keep_rows(kernels, rows, cache_slots, memory)
        recording = recording and isinstance(kept, DeviceRows) and not logits and _can_record()
        self._decoder, recording = self._open_decoder(kept, recording)
        self.runs_on = ", ".join(
            [
                f"ONNX Runtime {ort.__version__}",
                "operators of its own" if library else "standard operators",
                f"tokens on the {'device' if isinstance(kept, DeviceRows) else 'host'}",
                f"steps {'recorded if they can be' if recording else 'not recorded'}",
            ]
        )
        self._conditions = self._zeros(self._condition_names, (condition_slots, entries, width))
        self._caches = self._zeros(
            cache_names(layers), (cache_slots, manifest.cache_entries, width)
        )
        self._codebook_size = config.image.codebook_size
        self._call_inputs = step_call_inputs(config)
        self._columns = CrossColumns(config)
        # Entered around what a step launches: benchmarks time it on the GPU.
        self.launching: Callable[[], AbstractContextManager[None]] = nullcontext
        self.logits: Float | None = None
        self._keep_logits = logits
        kept_there: dict[str, _Place] = {
            name: (device, device_id, self._element, value.shape(), value.data_ptr())
            for name, value in (self._caches | self._conditions).items()
        }
        new_binding = partial(_binding, self._decoder, kept_there)
        self._step: DeviceStep | None = None
        if isinstance(kept, DeviceRows):
            self._step = DeviceStep(
                self._decoder, new_binding, kept, recording=recording, synchronous=logits
            )
        else:
            self._binding = new_binding()
        self._rows = kept  # the last attribute, so that the session is gone before its stream is

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
        first, rows = self._first_visual, (len(tokens),)
        self._encode(self._visual, inputs, condition_slot, first, rows)

    def open(self, stream: Stream) -> None:
        self._rows.open(stream)

    def stage(self, stream: Stream) -> None:
        self._rows.stage(stream)

    def step(self, parts: Sequence[Part]) -> list[bool]:
        if isinstance(self._rows, DeviceRows):
            self._launch(self._rows, parts)
            return self._rows.finish()
        batch = assemble(parts, self._rows.held, self._codebook_size, self._columns)
        with self._device_checked():
            tokens = self._run(batch)
        return self._rows.commit(parts, tokens)

    def steps(self, calls: Sequence[Sequence[Part]], until: Until) -> list[CallDone]:
        on_device = self._rows
        if not isinstance(on_device, DeviceRows):
            return steps_in_turn(self.step, calls, until)

        def launch(parts: Sequence[Part]) -> None:
            if not self._launch(on_device, parts):
                on_device.memory.wait()  # the next run may overwrite what this one copies from

        return on_device.steps(launch, calls, until)

    def _launch(self, on_device: DeviceRows, parts: Sequence[Part]) -> bool:
        """Puts a call into the stream; whether it had been recorded before."""
        assert self._step is not None
        count = sum(part.count * len(part.stream.lanes) for part in parts)
        tensors = on_device.begin(parts, self._step.rows(count))
        if self._keep_logits:
            self.logits = np.empty((count, self._codebook_size), np.float32)
        with self.launching():
            on_device.gather()
            with self._device_checked(on_device.memory.check):
                recorded = self._step.run(tensors, self.logits)
            on_device.commit()
        return recorded

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        return self._rows.tokens(stream, first, count)

    def close(self, stream: Stream) -> None:
        self._rows.close(stream)

    def _run(self, batch: StepBatch) -> Int:
        """The graph on arrays: i32 [T], -1 where a row's logits are no finite numbers."""
        for name in self._call_inputs:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(getattr(batch, name)))
        tokens = np.empty(len(batch.tokens), np.int32)
        self._bind_cpu_output("next_tokens", tokens)
        if self._keep_logits:
            self.logits = np.empty((len(tokens), self._codebook_size), np.float32)
            self._bind_cpu_output("logits", self.logits)
        self._decoder.run_with_iobinding(self._binding)
        return tokens

    def tokenize(self, pixels: Pixels, *, busy: bool = False) -> Int:
        with self._device_checked():
            return self._tokenizer.run(["codes"], {"pixels": pixels})[0]

    def tokenize_sketch(self, class_maps: npt.NDArray[np.uint8], *, busy: bool = False) -> Int:
        with self._device_checked():
            return self._sketches.run(["codes"], {"class_maps": class_maps})[0]

    def detokenize(self, codes: Int, *, busy: bool = False) -> Pixels:
        with self._device_checked():
            return self._detokenizer.run(["pixels"], {"codes": codes})[0]

    @cached_property
    def _visual(self) -> ort.InferenceSession:
        return self._session(VISUAL_ENCODER)

    @cached_property
    def _sketches(self) -> ort.InferenceSession:
        return self._session(SKETCH_TOKENIZER)

    def _keep_rows(
        self,
        kernels: Path | None,
        rows: int,
        lanes: int,
        new_memory: Callable[[], DeviceMemory] | None,
    ) -> DeviceRows | HostTokens:
        """On the device where that can be."""
        config = self.bundle.manifest.config
        if new_memory is None:
            new_memory = HostMemory
            if self.device == "cuda":
                new_memory = partial(CudaMemory, self.device_id)
        try:
            kernels = kernels or plugins_trt.rows()
            return DeviceRows(new_memory(), kernels, config, rows, lanes)
        except (FileNotFoundError, UnavailableError) as error:
            log.info("tokens stay on the host: %s", error)
            return HostTokens()

    def _open_decoder(
        self, kept: DeviceRows | HostTokens, recording: bool
    ) -> tuple[ort.InferenceSession, bool]:
        """And whether it records its calls, which needs all of the graph to run on the GPU."""
        stream = kept.memory.stream if isinstance(kept, DeviceRows) else None
        if recording:
            try:
                return self._session(DECODER_STEP, stream, recording=True), True
            except UnavailableError:
                raise
            except Exception as error:
                log.warning("steps are not recorded: %s", error)
        return self._session(DECODER_STEP, stream), False

    def _session(
        self, graph: str, stream: int | None = None, *, recording: bool = False
    ) -> ort.InferenceSession:
        """stream: a cudaStream_t that it runs in, None for one of its own."""
        path = self.bundle.graph(graph)
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device == "cuda":
            # TF32 would round products of fp32 to 10 bits. An exhaustive search for the fastest
            # convolutions, the default, would make the first call of each frame count slow.
            options: dict[str, Any] = {
                "device_id": self.device_id,
                "use_tf32": 0,
                "cudnn_conv_algo_search": "HEURISTIC",
                "enable_cuda_graph": int(recording),
            }
            if stream is not None:
                options["user_compute_stream"] = str(stream)
            providers.insert(0, (_CUDA, options))
        session = ort.InferenceSession(path, self._options, providers=providers)
        if self.device == "cuda" and session.get_providers()[0] != _CUDA:
            raise UnavailableError(
                f"{self.name} found no GPU {self.device_id}, or no libraries of CUDA and cuDNN; "
                f"ONNX Runtime's log says which"
            )
        return session

    def _zeros(self, names: Sequence[str], shape: tuple[int, ...]) -> dict[str, ort.OrtValue]:
        """Arrays on the device by name."""
        empty = np.zeros(shape, self._storage)
        return {
            name: ort.OrtValue.ortvalue_from_numpy(empty.copy(), self.device, self.device_id)
            for name in names
        }

    def _encode(
        self,
        session: ort.InferenceSession,
        inputs: dict[str, Int],
        slot: int,
        first: int,
        rows: tuple[int, ...],
    ) -> None:
        """Runs an encoder, whose outputs [*rows, d] go into a condition slot from entry `first`."""
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._condition_names:
            slots, entries, width = self._conditions[name].shape()
            assert slot < slots and first + math.prod(rows) <= entries, "there is no such entry"
            offset = (slot * entries + first) * width * self._storage.itemsize
            address = self._conditions[name].data_ptr() + offset
            shape = (*rows, width)
            binding.bind_output(name, self.device, self.device_id, self._element, shape, address)
        with self._device_checked():
            session.run_with_iobinding(binding)

    @contextmanager
    def _device_checked(self, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Where ONNX Runtime fails because the GPU is lost, DeviceLostError instead.

        Its errors are all of one kind, and those of libraries that CUDA failed in do not say why:
        cuda-python is asked, too, where it is there. check: how, in the thread of steps; others
        must leave their stream alone, in which a step may be being recorded.
        """
        if isinstance(self._rows, DeviceRows):
            self._rows.memory.enter()
        try:
            yield
        except Exception as error:
            if _LOST.search(str(error)):
                raise DeviceLostError(
                    f"GPU {self.device_id} is lost to this process ({error})"
                ) from error
            if isinstance(self._rows, DeviceRows):
                (check or self._rows.memory.ask)()
            raise

    def _bind_cpu_output(self, name: str, array: npt.NDArray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _binding(session: ort.InferenceSession, kept: Mapping[str, _Place]) -> Any:
    """Of decoder_step, to what all calls have in common; caches are outputs, too."""
    binding = session.io_binding()
    for name, place in kept.items():
        binding.bind_input(name, *place)
        if "_cache_" in name:
            binding.bind_output(f"{name}_out", *place)
    return binding


def _can_record() -> bool:
    """Whether this ONNX Runtime's CUDA graphs can be trusted; if not, why in the log."""
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < _RECORDING_SINCE:
        least = ".".join(map(str, _RECORDING_SINCE))
        log.warning(
            "steps are not recorded, which makes them slower: CUDA graphs of ONNX Runtime %s read "
            "freed memory; install %s or later",
            ort.__version__,
            least,
        )
    return version >= _RECORDING_SINCE


def _operators(config: ModelConfig, device_id: int) -> Path | None:
    """The library of custom operators, if there is one, it runs here, and can do all calls.

    It takes the place of the function bodies altogether.
    """
    heads = [config.decoder.heads, *([config.visual.heads] if config.visual else [])]
    head_dims = {config.decoder.width // count for count in heads}
    seen = max(config.decoder.neighbour_count, ConditionLayout.of(config).entries)
    reason = ""
    if not head_dims <= set(_HEAD_DIMS):
        reason = f"its heads are {sorted(head_dims)} wide"
    elif seen > _MOST_NEIGHBOURS:
        reason = f"a position may see {seen} others"
    else:
        try:
            library = plugins_trt.operators()
            reason = _unusable(library, device_id)
        except FileNotFoundError as error:
            reason = str(error)
    if reason:
        log.info("3DNA runs as standard operators: %s", reason)
        return None
    return library


def _unusable(library: Path, device_id: int) -> str:
    """Why the kernels of the library cannot run on a GPU; "" if they can."""
    call = ctypes.CDLL(str(library)).nuwa_unusable
    call.restype = ctypes.c_char_p
    return (call(device_id) or b"").decode()
