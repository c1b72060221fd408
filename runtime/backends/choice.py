"""Which backend runs a bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..bundle import Bundle
from ..errors import UnavailableError
from .base import (
    AUTO,
    BACKENDS,
    ONNXRUNTIME_CPU,
    ONNXRUNTIME_CUDA,
    TENSORRT,
    TENSORRT_RTX,
    Backend,
)
from .native_cpu import NativeCpu
from .onnxruntime_cpu import OnnxRuntimeCpu
from .onnxruntime_cuda import OnnxRuntimeCuda
from .tensorrt import TensorRt, TensorRtRtx

log = logging.getLogger("nuwa.runtime")


def make_backend(name: str, bundle: Bundle, **arguments: Any) -> Backend:
    """The backend of that name for a bundle; "auto" is the fastest for this machine's processor.

    arguments: those of the backends, which all take the same. UnavailableError if the one that
    `name` asks for is not to be had here, or has no memory for so many slots.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    try:
        return _made(name, bundle, **arguments)
    except MemoryError as error:
        slots = arguments.get("cache_slots", 2) // 2
        raise UnavailableError(
            f"there is no memory for {slots} slots on {name}, use fewer ({error})"
        ) from error


def _made(name: str, bundle: Bundle, **arguments: Any) -> Backend:
    by_name: dict[str, Callable[..., Backend]] = {
        ONNXRUNTIME_CPU: OnnxRuntimeCpu,
        ONNXRUNTIME_CUDA: OnnxRuntimeCuda,
        TENSORRT: TensorRt,
        TENSORRT_RTX: TensorRtRtx,
    }
    if name in by_name:
        return by_name[name](bundle, **arguments)
    try:
        return NativeCpu(bundle, **arguments)
    except UnavailableError as error:
        if name != AUTO:
            raise
        log.info("decoding on ONNX Runtime: %s", error)
        return OnnxRuntimeCpu(bundle, **arguments)
