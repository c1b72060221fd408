"""The graphs of a bundle that run once a request or a frame, on ONNX Runtime's CPU provider.

What they put into condition slots stays here, as plain arrays, for whatever runs decoder_step. The
CPU backends are made of this and of a way to run a step. Knows no request and no schedule.

Legend: C condition slots, E their entries, d width, L layers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.grid import Int
from nuwa.spec.manifest import (
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    SKETCH_TOKENIZER,
    TEXT_ENCODER,
    VISUAL_ENCODER,
    condition_outputs,
    layer_names,
)
from nuwa.spec.onnx_file import widen

from ..bundle import Bundle
from ..core import Pixels
from .cores import Cores
from .frame_graph import FrameGraph
from .helpers import Helpers

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # Linux control groups: microseconds of every so many


class Frames(Protocol):
    """FrameGraph, or what else makes something of every frame."""

    def run(self, frames: npt.NDArray, *, busy: bool) -> npt.NDArray: ...


Layers = dict[str, npt.NDArray[np.floating]]


class OnnxRuntimeGraphs:
    """All of Backend but its step and its name.

    threads: None means one a core that this process may use; spinning: idle threads wait actively;
    conditions: [C, E, d] by name, cross_key_0 and so on, of type `storage`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        condition_slots: int,
        threads: int | None,
        spinning: bool,
        storage: npt.DTypeLike,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads} is not at least 1")
        config = bundle.manifest.config
        self.runs_on = f"ONNX Runtime {ort.__version__}"
        self.bundle, self.threads = bundle, threads or cores()
        self._spinning = spinning
        self._cores = Cores(self.threads)
        self._tokenizer = self._frame_graph(IMAGE_TOKENIZER)
        self._detokenizer = self._frame_graph(IMAGE_DETOKENIZER, whole=True)
        self._visuals: dict[int, ort.InferenceSession] = {}  # by how many threads they take
        self._layout = ConditionLayout.of(config)
        layers = config.decoder.layers
        shape = (condition_slots, self._layout.entries, config.decoder.width)
        self._condition_names = condition_outputs(layers)
        self.conditions = allocate(self._condition_names, shape, storage)
        self._load_encoders()

    most_rows: int | None = None  # ONNX Runtime and the native decoder make room as calls come
    most_candidates: int | None = None

    def _load_encoders(self) -> None:
        """The text encoder; the visual one when a request needs it."""
        self._text = self.session(TEXT_ENCODER)

    def encode_text(
        self, ids: Int, condition_slots: Sequence[int], first: int, *, busy: bool = False
    ) -> None:
        with self._cores.lend(self.threads):
            encoded = self._text.run(self._condition_names, {"tokens": ids})
        for name, rows in zip(self._condition_names, encoded, strict=True):
            self.conditions[name][list(condition_slots), first : first + rows.shape[1]] = rows

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
        used = self._cores.share if busy else self.threads
        with self._cores.lend(used):
            encoded = self._visual(used).run(self._condition_names, inputs)
        first = self._layout.visual
        for name, rows in zip(self._condition_names, encoded, strict=True):
            self.conditions[name][condition_slot, first : first + len(rows)] = rows

    def tokenize(self, pixels: Pixels, *, busy: bool = False) -> Int:
        return self._tokenizer.run(pixels, busy=busy)

    def tokenize_sketch(self, class_maps: npt.NDArray[np.uint8], *, busy: bool = False) -> Int:
        return self._sketches.run(class_maps, busy=busy)

    def detokenize(self, codes: Int, *, busy: bool = False) -> Pixels:
        return self._detokenizer.run(codes, busy=busy)

    def session(self, graph: str, threads: int | None = None) -> ort.InferenceSession:
        """A graph of the bundle, ready to run on so many threads, by default on all.

        One of bf16 with the same weights in fp32: ONNX Runtime has no CPU kernels of that.
        """
        path, threads = self.bundle.graph(graph), threads or self.threads
        if self.bundle.manifest.precision != "bf16":
            return _session(path, self._spinning, threads)
        with tempfile.TemporaryDirectory(prefix="nuwa-") as folder:
            widen(path, wide := Path(folder) / path.name)
            return _session(wide, self._spinning, threads)

    def _frame_graph(self, graph: str, *, whole: bool = False) -> Frames:
        session = partial(_session, self.bundle.graph(graph), self._spinning)
        return FrameGraph(session, self._cores, self._pool, whole=whole)

    @cached_property
    def _pool(self) -> Helpers | None:
        """Threads that run frames side by side; FrameGraphs share them."""
        return Helpers(self.threads - 1, "nuwa-frames") if self.threads > 1 else None

    @cached_property
    def _sketches(self) -> Frames:
        return self._frame_graph(SKETCH_TOKENIZER)

    def _visual(self, threads: int) -> ort.InferenceSession:
        if threads not in self._visuals:
            self._visuals[threads] = self.session(VISUAL_ENCODER, threads)
        return self._visuals[threads]


def allocate(names: Sequence[str], shape: tuple[int, ...], storage: npt.DTypeLike) -> Layers:
    """One array of zeros by name: entries are read before they are written, and weighed with 0."""
    return {name: np.zeros(shape, storage) for name in names}


def cache_names(layers: int) -> list[str]:
    """Names of the key and value caches of all layers."""
    return [*layer_names("key_cache", layers), *layer_names("value_cache", layers)]


def cores() -> int:
    """Cores that this process may use, which in a container are fewer than there are."""
    affine = getattr(os, "sched_getaffinity", None)
    count = len(affine(0)) if affine else os.cpu_count() or 1
    try:
        quota, period = _CPU_MAX.read_text().split()
        return min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return count


def _session(path: Path, spinning: bool, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.log_severity_level = 3  # errors
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
