"""What a machine is asked through: its files, its commands, NVML. Tests have another one.

What a system does not tell is None, and is never an error. Units are in the names; clocks are MHz.
"""

from __future__ import annotations

import functools
import glob
import importlib
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

IDLE = "idle"
THROTTLE_REASONS = {  # bits of NVML's clocks event reasons
    0x001: IDLE,
    0x002: "clocks set by the user",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}
VISIBLE = "CUDA_VISIBLE_DEVICES"

Gauge = Callable[[], float | None]


class Hardware:
    """All that is read of a machine. Tests have another."""

    def text(self, path: str) -> str | None:
        """A file's text without what surrounds it, zeros of device trees too; None without it."""
        try:
            return Path(path).read_text(errors="replace").strip("\0 \t\n")
        except OSError:
            return None

    def paths(self, pattern: str) -> list[str]:
        """Those that there are of a pattern with *, in order."""
        return sorted(glob.glob(pattern))

    def answer(self, *command: str) -> str | None:
        """What a command prints; None if it is not there or does not succeed."""
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return ran.stdout.strip()

    def involuntary_switches(self) -> float | None:
        """How often another thread took a core away from one of this process."""
        try:
            import resource
        except ImportError:  # Windows
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    @functools.cached_property
    def nvml(self) -> Any:
        """The module pynvml, ready; None without it, without a driver and without rights."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        return nvml

    @property
    def gpus(self) -> list[Gpu]:
        """Those that NVML sees."""
        if self.nvml is None:
            return []
        try:
            return [Gpu(self.nvml, index) for index in range(self.nvml.nvmlDeviceGetCount())]
        except self.nvml.NVMLError:
            return []


class Gpu:
    """A GPU by NVML; what NVML does not tell of it is None."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.index = index
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)

    def describe(self) -> dict[str, Any]:
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        sm, fast = self._nvml.NVML_CLOCK_SM, self._nvml.NVML_CLOCK_MEM
        persistence = self._ask("nvmlDeviceGetPersistenceMode")
        cuda = asked(self._nvml, "nvmlSystemGetCudaDriverVersion_v2")
        return {
            "name": _plain(self._ask("nvmlDeviceGetName")),
            "driver": _plain(asked(self._nvml, "nvmlSystemGetDriverVersion")),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "memory_bytes": None if memory is None else memory.total,
            "power_limit_watts": scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "persistence_mode": None if persistence is None else bool(persistence),
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", sm),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", fast),
            "most_sm_mhz": self._ask("nvmlDeviceGetMaxClockInfo", sm),
            "most_memory_mhz": self._ask("nvmlDeviceGetMaxClockInfo", fast),
            "throttle_reasons": self.throttle_reasons(),
        }

    @property
    def uuid(self) -> str | None:
        """As CUDA_VISIBLE_DEVICES may name it."""
        return _plain(self._ask("nvmlDeviceGetUUID"))

    @property
    def has_this_process(self) -> bool:
        """Whether this process computes there; never so in a container with numbers of its own."""
        return any(
            process.pid == os.getpid()
            for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ()
        )

    def gauges(self) -> dict[str, Gauge]:
        """What may be sampled, by name."""
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        asked: dict[str, Gauge] = {
            "sm_mhz": self._asking("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            "memory_mhz": self._asking("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            "celsius": self._asking("nvmlDeviceGetTemperature", sensor),
            "watts": lambda: scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            "used_bytes": self.used_bytes,
            "process_bytes": self.process_bytes,
        }
        return {f"gpu{self.index}_{name}": gauge for name, gauge in asked.items()}

    def joules(self) -> float | None:
        """Of the board since the driver was loaded."""
        return scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3)

    def throttle_reasons(self) -> list[str]:
        """Why its clocks are not higher now."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # as older drivers call them
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return [reason for bit, reason in THROTTLE_REASONS.items() if (bits or 0) & bit]

    def used_bytes(self) -> int | None:
        """Of all processes."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else memory.used

    def process_bytes(self) -> int | None:
        """Of this process; None in a container where NVML knows it by another number."""
        for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ():
            if process.pid == os.getpid():
                return process.usedGpuMemory
        return None

    def _asking(self, name: str, *arguments: Any) -> Gauge:
        return functools.partial(self._ask, name, *arguments)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return asked(self._nvml, name, self._handle, *arguments)


def gpus_in_use(
    gpus: list[Gpu], backend: str, environment: Mapping[str, str] = os.environ
) -> list[Gpu]:
    """Of all that NVML sees the one that a backend of this process computes on; none for one that
    computes on the processor.

    It is the one on which NVML sees this process; else the first that CUDA may see, or that there
    is: backends take CUDA's device 0.
    """
    if backend.endswith("cpu") or not gpus:
        return []
    if known := [gpu for gpu in gpus if gpu.has_this_process]:
        return known
    first = environment.get(VISIBLE, "").split(",")[0].strip()
    if first.isdigit():
        return [gpu for gpu in gpus if gpu.index == int(first)]
    if first:
        return [gpu for gpu in gpus if (gpu.uuid or "").startswith(first)]
    return gpus[:1]


def asked(nvml: Any, name: str, *arguments: Any) -> Any:
    """What a function of NVML says; None if this version or this GPU does not have it."""
    try:
        return getattr(nvml, name)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return None


def reading(hardware: Hardware, path: str, scale: float) -> float | None:
    return scaled(number(hardware.text(path)), scale)


def number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _plain(text: Any) -> Any:
    """Older versions of pynvml answer in bytes."""
    return text.decode() if isinstance(text, bytes) else text
