"""decoder_step on ONNX Runtime with all of a call on the device, recorded as CUDA graphs.

The CUDA provider records a graph for each size of a call (its `gpu_graph_id`) and launches it from
the second call on. The first call runs its kernels three times, which changes nothing: what a step
writes depends on none of it. It never forgets a graph, so that only so many sizes are recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from .device_memory import DeviceMemory
from .device_rows import MOST_RECORDINGS, Tensor, padded

log = logging.getLogger("nuwa.runtime")

_UNRECORDED = -1  # a gpu_graph_id


class DeviceStep:
    """Calls of one session in the stream of `memory`; of one thread.

    new_binding: a binding of the session to what all calls have in common; recording: the session
    was made to record (enable_cuda_graph). `recording` says whether it does still.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        new_binding: Callable[[], Any],
        memory: DeviceMemory,
        *,
        recording: bool,
        synchronous: bool,
    ) -> None:
        self._session, self._new_binding = session, new_binding
        self._synchronous = synchronous
        self.recording = recording
        # Those of sizes that have a recording, by all that is bound.
        self._recorded: dict[tuple[Tensor, ...], tuple[Any, ort.RunOptions]] = {}
        self._binding, self._bound = new_binding(), dict[str, Tensor]()
        self._options = self._run_options(_UNRECORDED)
        self._memory = memory  # the last attribute, so that the session is gone before its stream

    def rows(self, count: int) -> int:
        """How many rows a call of so many should have."""
        return padded(count) if self.recording else count

    def run(self, tensors: dict[str, Tensor], logits: npt.NDArray | None = None) -> None:
        """Puts a call into the stream; logits: filled too, f32 [T, K], if nothing is recorded."""
        if self.recording and self._launched(tensors):
            return
        for name, tensor in tensors.items():
            if self._bound.get(name) != tensor:
                self._bind(self._binding, name, tensor)
        self._bound = tensors
        if logits is not None:
            address = logits.ctypes.data
            self._binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, address)
        self._session.run_with_iobinding(self._binding, self._options)

    def _launched(self, tensors: dict[str, Tensor]) -> bool:
        """Runs a call of a size that is recorded, or can be; False if it is still to be run."""
        size = tuple(tensors.values())
        if call := self._recorded.get(size):
            self._session.run_with_iobinding(*call)
            return True
        if len(self._recorded) == MOST_RECORDINGS:
            return False
        binding = self._new_binding()
        for name, tensor in tensors.items():
            self._bind(binding, name, tensor)
        call = binding, self._run_options(1 + len(self._recorded))
        try:
            self._session.run_with_iobinding(*call)
        except Exception as error:
            self._memory.abandon()
            self._memory.check()
            log.warning("steps are not recorded any more: %s", error)
            self.recording = False
            return False
        self._recorded[size] = call
        return True

    def _bind(self, binding: Any, name: str, tensor: Tensor) -> None:
        bind = binding.bind_output if name == "next_tokens" else binding.bind_input
        place = self._memory.kind, self._memory.index
        bind(name, *place, tensor.dtype, tensor.shape, tensor.address)

    def _run_options(self, graph_id: int) -> ort.RunOptions:
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        if not self._synchronous:
            # What comes next is in the same stream.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options
