"""A bundle's graphs on ONNX Runtime's CPU provider, with caches that are updated in place.

Every cache is one numpy array, bound both as an input and as an output of decoder_step: a call
then costs the same however many slots there are. Knows no request and no schedule.

Legend: S cache slots, R entries a slot, C condition slots, M text length, d width, L layers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.grid import Int
from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    SKETCH_TOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    condition_outputs,
    layer_names,
    step_call_inputs,
)

from ..bundle import Bundle
from ..core import Pixels
from .base import Float, StepBatch

_STORAGE = {"fp32": np.float32, "fp16": np.float16}


class OnnxRuntimeCpu:
    """The embedded default backend.

    threads: None means one a core that this process may use. spinning: idle threads of a step wait
    actively, which is faster but takes whole cores while anything is generated. logits: keep the
    logits of every step in `logits` f32 [T, K]; for verification, not for serving.
    """

    name = "onnxruntime-cpu"

    def __init__(
        self,
        bundle: Bundle,
        *,
        cache_slots: int,
        condition_slots: int,
        threads: int | None = None,
        spinning: bool = False,
        logits: bool = False,
    ) -> None:
        config, manifest = bundle.manifest.config, bundle.manifest
        self._bundle, self._options = bundle, _options(threads, spinning)
        self._text = self._session(TEXT_ENCODER)
        self._tokenizer = self._session(IMAGE_TOKENIZER)
        self._detokenizer = self._session(IMAGE_DETOKENIZER)
        self._decoder = self._session(DECODER_STEP)
        self._codebook_size = config.image.codebook_size
        self.logits: Float | None = None
        self._keep_logits = logits

        layers, width = config.decoder.layers, config.decoder.width
        dtype = _STORAGE[manifest.precision]

        def allocate(kind: str, slots: int, rows: int) -> dict[str, npt.NDArray[np.floating]]:
            shape = (slots, rows, width)
            return {name: np.zeros(shape, dtype) for name in layer_names(kind, layers)}

        self._layout = ConditionLayout.of(config)
        entries, conditions = manifest.cache_entries, self._layout.entries
        self.caches = allocate("key_cache", cache_slots, entries)
        self.caches |= allocate("value_cache", cache_slots, entries)
        self.conditions = allocate("cross_key", condition_slots, conditions)
        self.conditions |= allocate("cross_value", condition_slots, conditions)
        self._condition_names = condition_outputs(layers)
        self._call_inputs = step_call_inputs(config)
        self._binding = self._decoder.io_binding()
        for name, array in (self.caches | self.conditions).items():
            value = ort.OrtValue.ortvalue_from_numpy(array)  # shares the array's memory
            self._binding.bind_ortvalue_input(name, value)
            if name in self.caches:
                self._binding.bind_ortvalue_output(f"{name}_out", value)

    def encode_text(self, ids: Int, condition_slots: Sequence[int], first: int) -> None:
        encoded = self._text.run(self._condition_names, {"tokens": ids})
        for name, rows in zip(self._condition_names, encoded, strict=True):
            self.conditions[name][list(condition_slots), first : first + rows.shape[1]] = rows

    def encode_visual(
        self, tokens: Int, coordinates: Int, neighbours: Int, condition_slot: int
    ) -> None:
        inputs = {"tokens": tokens, "coordinates": coordinates, "neighbours": neighbours}
        encoded = self._visual.run(self._condition_names, inputs)
        first = self._layout.visual
        for name, rows in zip(self._condition_names, encoded, strict=True):
            self.conditions[name][condition_slot, first : first + len(rows)] = rows

    def step(self, batch: StepBatch) -> Int:
        for name in self._call_inputs:
            self._binding.bind_cpu_input(name, getattr(batch, name))
        tokens = np.empty(len(batch.tokens), np.int32)
        self._bind_output("next_tokens", tokens)
        if self._keep_logits:
            self.logits = np.empty((len(tokens), self._codebook_size), np.float32)
            self._bind_output("logits", self.logits)
        self._decoder.run_with_iobinding(self._binding)
        return tokens

    def tokenize(self, pixels: Pixels) -> Int:
        return self._tokenizer.run(["codes"], {"pixels": pixels})[0]

    def tokenize_sketch(self, class_maps: npt.NDArray[np.uint8]) -> Int:
        return self._sketches.run(["codes"], {"class_maps": class_maps})[0]

    def detokenize(self, codes: Int) -> Pixels:
        return self._detokenizer.run(["pixels"], {"codes": codes})[0]

    @cached_property
    def _visual(self) -> ort.InferenceSession:
        return self._session(VISUAL_ENCODER)

    @cached_property
    def _sketches(self) -> ort.InferenceSession:
        return self._session(SKETCH_TOKENIZER)

    def _session(self, graph: str) -> ort.InferenceSession:
        path = self._bundle.graph(graph)
        return ort.InferenceSession(path, self._options, providers=["CPUExecutionProvider"])

    def _bind_output(self, name: str, array: npt.NDArray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _options(threads: int | None, spinning: bool) -> ort.SessionOptions:
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads} is not at least 1")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.log_severity_level = 3  # errors
    return options


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
