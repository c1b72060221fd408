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
from ..core import Until
from .base import (
    CPU_PRECISIONS,
    ONNXRUNTIME_CPU,
    CallDone,
    Float,
    Part,
    check_precision,
    steps_in_turn,
)
from .host_tokens import HostTokens
from .onnxruntime_graphs import OnnxRuntimeGraphs, allocate, cache_names
from .step_batch import CrossColumns, StepBatch, assemble

_STORAGE = dict.fromkeys(CPU_PRECISIONS, np.float32) | {"fp16": np.float16}


class OnnxRuntimeCpu(OnnxRuntimeGraphs, HostTokens):
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
        check_precision(self.name, manifest.precision, CPU_PRECISIONS)
        storage = _STORAGE[manifest.precision]
        HostTokens.__init__(self)
        OnnxRuntimeGraphs.__init__(
            self,
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
        shape = (cache_slots, manifest.cache_entries, config.decoder.width)
        self.caches = allocate(cache_names(config.decoder.layers), shape, storage)
        self._binding = self._decoder.io_binding()
        for name, array in (self.caches | self.conditions).items():
            value = ort.OrtValue.ortvalue_from_numpy(array)  # shares the array's memory
            self._binding.bind_ortvalue_input(name, value)
            if name in self.caches:
                self._binding.bind_ortvalue_output(f"{name}_out", value)

    def step(self, parts: Sequence[Part]) -> list[bool]:
        batch = assemble(parts, self.held, self._codebook_size, self._columns)
        return self.commit(parts, self.run(batch))

    def steps(self, calls: Sequence[Sequence[Part]], until: Until) -> list[CallDone]:
        return steps_in_turn(self.step, calls, until)

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
