"""decoder_step on ONNX Runtime's CPU provider, with caches that are updated in place.

Every cache is one numpy array, bound both as an input and as an output of decoder_step: a call
then costs the same however many slots there are. Runs any bundle on any processor; native_cpu.py
is faster where there is a library for the machine.

Legend: S cache slots, R entries a slot, d width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nuwa.spec.grid import Int
from nuwa.spec.manifest import DECODER_STEP, step_call_inputs

from ..bundle import Bundle
from .base import ONNXRUNTIME_CPU, Float, Part, Stream
from .onnxruntime_graphs import OnnxRuntimeGraphs, allocate, cache_names
from .step_batch import CrossColumns, StepBatch, assemble

_STORAGE = {"fp32": np.float32, "fp16": np.float16, "int8": np.float32}


class OnnxRuntimeCpu(OnnxRuntimeGraphs):
    """A backend.

    rows: ignored, ONNX Runtime makes room as calls come; threads: None means one a core that this
    process may use. spinning: idle threads of a step wait actively, which is faster but takes whole
    cores while anything is generated. logits: keep the logits of every step in `logits` f32 [T, K];
    for verification, not for serving.
    """

    name = ONNXRUNTIME_CPU

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
    ) -> None:
        config, manifest = bundle.manifest.config, bundle.manifest
        storage = _STORAGE[manifest.precision]
        super().__init__(
            bundle,
            condition_slots=condition_slots,
            threads=threads,
            spinning=spinning,
            storage=storage,
        )
        self._decoder = self.session(DECODER_STEP)
        self._codebook_size = config.image.codebook_size
        self.logits: Float | None = None
        self._keep_logits = logits
        self._call_inputs = step_call_inputs(config)
        self._columns = CrossColumns(config)
        self._tokens: dict[Stream, Int] = {}
        shape = (cache_slots, manifest.cache_entries, config.decoder.width)
        self.caches = allocate(cache_names(config.decoder.layers), shape, storage)
        self._binding = self._decoder.io_binding()
        for name, array in (self.caches | self.conditions).items():
            value = ort.OrtValue.ortvalue_from_numpy(array)  # shares the array's memory
            self._binding.bind_ortvalue_input(name, value)
            if name in self.caches:
                self._binding.bind_ortvalue_output(f"{name}_out", value)

    def open(self, stream: Stream) -> None:
        self._tokens[stream] = np.zeros(stream.held, np.int32)

    def stage(self, stream: Stream) -> None:
        """Rows are read where they are."""

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        return self._tokens[stream][first : first + count].copy()

    def close(self, stream: Stream) -> None:
        self._tokens.pop(stream, None)

    def step(self, parts: Sequence[Part]) -> list[bool]:
        drawn = self.run(
            assemble(parts, self._tokens.__getitem__, self._codebook_size, self._columns)
        )
        finite, start = [], 0
        for part in parts:
            rows, held = part.stream.rows, self._tokens[part.stream]
            staged = slice(part.first, part.first + part.count)
            own, given = drawn[start : start + part.count], rows.given[staged]
            finite.append(bool((own[given < 0] >= 0).all()))
            held[rows.place[staged]] = np.where(given < 0, own, given)
            start += part.count * len(part.stream.lanes)
        return finite

    def run(self, batch: StepBatch) -> Int:
        """The graph itself: i32 [T], -1 where a row's logits are no finite numbers."""
        for name in self._call_inputs:
            self._binding.bind_cpu_input(name, getattr(batch, name))
        tokens = np.empty(len(batch.tokens), np.int32)
        self._bind_output("next_tokens", tokens)
        if self._keep_logits:
            self.logits = np.empty((len(tokens), self._codebook_size), np.float32)
            self._bind_output("logits", self.logits)
        self._decoder.run_with_iobinding(self._binding)
        return tokens

    def _bind_output(self, name: str, array: npt.NDArray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
