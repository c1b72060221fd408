"""decoder_step on ONNX Runtime with all of a call on the device, recorded as CUDA graphs.

The CUDA provider records a graph for each size of a call (its `gpu_graph_id`) and launches it from
the second call on. The first call runs its kernels three times, which changes nothing: what a step
writes depends on none of it.

Recorded graphs read ones by which the provider multiplies biases, as many as a call has rows. When
a call has more rows than all before in its thread, it frees them and makes others. So a call that
is wider than all before is padded well beyond, is not recorded, and all that was is forgotten.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from .device_rows import MOST_RECORDINGS, DeviceRows, Tensor, padded

log = logging.getLogger("nuwa.runtime")

_UNRECORDED = -1  # a gpu_graph_id
_LEAST_WIDE = 256  # rows: of a request alone, few calls have more
# Of all that are ever made: to release a graph does nothing in providers that cannot, and of the
# sources of the CUDA provider that were read none could. A graph may take megabytes.
_MOST_MADE = 8 * MOST_RECORDINGS
_OF_RECORDING = re.compile("captur|cudaGraph", re.IGNORECASE)  # errors


class DeviceStep:
    """Calls of one session in the stream of `rows`; of one thread.

    new_binding: a binding of the session to what all calls have in common; recording: the session
    was made to record (enable_cuda_graph). `recording` says whether it does still, `made` how many
    graphs it has begun, `padding` whether calls are as wide as if it did, which a benchmark wants.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        new_binding: Callable[[], Any],
        rows: DeviceRows,
        *,
        recording: bool,
        synchronous: bool,
    ) -> None:
        self._session, self._new_binding = session, new_binding
        self._synchronous = synchronous
        self.recording = self.padding = recording
        # Those of sizes that have a recording, by all that is bound, the one used last at the end.
        self._recorded: dict[tuple[Tensor, ...], tuple[int, Any, ort.RunOptions]] = {}
        self.made = self._widest = self._generation = 0
        self._binding, self._bound = new_binding(), dict[str, Tensor]()
        self._options = self._run_options(_UNRECORDED)
        self._rows = rows  # the last attribute, so that the session is gone before its stream

    def rows(self, count: int) -> int:
        """How many rows a call of so many should have."""
        if not self.padding:
            return count
        room = self._rows.capacity if count <= self._rows.capacity else sys.maxsize  # it is made
        rows = min(padded(count), room)
        if rows > self._widest:
            rows = min(max(_LEAST_WIDE, 1 << (count - 1).bit_length()), room)
        return rows

    def run(self, tensors: dict[str, Tensor], logits: npt.NDArray | None = None) -> bool:
        """Puts a call into the stream; logits: filled too, f32 [T, K], if nothing is recorded.

        Whether it was one that had been recorded before.
        """
        (rows,) = tensors["tokens"].shape
        wider = rows > self._widest
        if wider or self._generation != self._rows.generation:
            self._forget()
        if self.recording and not wider:
            if recorded := self._recorded.pop(size := tuple(tensors.values()), None):
                self._recorded[size] = recorded
                self._session.run_with_iobinding(*recorded[1:])
                return True
            if self._record(size, tensors):
                return False
        for name, tensor in tensors.items():
            if self._bound.get(name) != tensor:
                self._bind(self._binding, name, tensor)
        self._bound = tensors
        if logits is not None:
            address = logits.ctypes.data
            self._binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, address)
        self._session.run_with_iobinding(self._binding, self._options)
        self._widest = max(rows, self._widest)
        return False

    def _record(self, size: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> bool:
        """Runs a call of a size that can be recorded; False if it is still to be run."""
        if not self._has_place():
            return False
        binding = self._new_binding()
        for name, tensor in tensors.items():
            self._bind(binding, name, tensor)
        self.made += 1
        options = self._run_options(self.made)
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:
            memory = self._rows.memory
            begun = memory.abandon()
            memory.check()
            if not begun and not _OF_RECORDING.search(str(error)):
                raise  # of the call itself, as for want of memory: others may be recorded
            log.warning("steps are not recorded any more: %s", error)
            self.recording = self.padding = False
            return False
        self._recorded[size] = self.made, binding, options
        if self.made == _MOST_MADE:
            log.warning("%d sizes of steps were recorded, others are not any more", _MOST_MADE)
        return True

    def _has_place(self) -> bool:
        """Whether one more can be recorded, for which the one used longest ago is released."""
        if self.made >= _MOST_MADE:
            return False
        if len(self._recorded) >= MOST_RECORDINGS:
            if not hasattr(self._session, "release_captured_graph"):  # before ONNX Runtime 1.32
                return False
            self._release(next(iter(self._recorded)))
        return True

    def _forget(self) -> None:
        """What was recorded reads memory that is gone, or will be."""
        if self._recorded:
            self._rows.memory.wait()
        for size in list(self._recorded):
            self._release(size)
        self._generation = self._rows.generation

    def _release(self, size: tuple[Tensor, ...]) -> None:
        graph_id, *_ = self._recorded.pop(size)
        if hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph_id)

    def _bind(self, binding: Any, name: str, tensor: Tensor) -> None:
        bind = binding.bind_output if name == "next_tokens" else binding.bind_input
        place = self._rows.memory.kind, self._rows.memory.index
        bind(name, *place, tensor.dtype, tensor.shape, tensor.address)

    def _run_options(self, graph_id: int) -> ort.RunOptions:
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        if not self._synchronous:
            # What comes next is in the same stream.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options
