"""Memory that this process had at most, and what it has on GPUs."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .hardware import Gpu, Hardware


def peak_memory(hardware: Hardware | None = None) -> dict[str, Any]:
    """JSON-able: bytes that this process had at most, and what GPUs have in use now.

    The most that a GPU had in use while something ran is Sampler's.
    """
    hardware = hardware or Hardware()
    return {
        "peak_process_bytes": process_peak(hardware),
        "gpus": [
            {"gpu": gpu.index, "process_bytes": gpu.process_bytes(), "used_bytes": gpu.used_bytes()}
            for gpu in hardware.gpus
        ],
    }


def forget_peak() -> None:
    """Has Linux count this process' peak of memory anew; elsewhere it is that of all its life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def used_on_devices(hardware: Hardware | None = None) -> dict[int, int]:
    """Bytes in use on each GPU now, of all processes: to be asked before a model is loaded."""
    gpus = (hardware or Hardware()).gpus
    return {gpu.index: used for gpu in gpus if (used := gpu.used_bytes()) is not None}


def device_peak(
    seen: Mapping[str, Mapping[str, float]],
    gpus: Iterable[Gpu],
    before: Mapping[int, int] | None = None,
) -> tuple[float | None, str | None]:
    """(bytes that this process had at most on one of the GPUs, None, or what to know of it).

    seen: of a Sampler; before: `used_on_devices` before the model was loaded. Where NVML knows this
    process by another number, as in containers, it is what was in use over what was before, and
    without `before` what was in use.
    """
    own, others, whole = [], [], []
    for gpu in gpus:
        process, used = (
            (seen.get(f"gpu{gpu.index}_{kind}_bytes") or {}).get("most")
            for kind in ("process", "used")
        )
        if process is not None:
            own.append(process)
        elif used is not None and before is not None and gpu.index in before:
            others.append(used - before[gpu.index])
        elif used is not None:
            whole.append(used)
    if own:
        return max(own), None
    if others:
        return max(others), (
            "Device memory is what the GPU had in use over what it had before the model was "
            "loaded: NVML does not tell this process's."
        )
    if whole:
        return max(whole), (
            "Device memory is of all processes on the GPU: NVML does not tell this process's."
        )
    return None, None


def process_peak(hardware: Hardware) -> int | None:
    match = re.search(r"VmHWM:\s+(\d+) kB", hardware.text("/proc/self/status") or "")
    if match is not None:
        return 1024 * int(match[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
