"""What machine a number belongs to, and what it did meanwhile: clocks, heat, throttling, energy.

All of it comes from /proc, /sys, a command of Jetson boards and, for GPUs, NVML (`nvidia-ml-py`, if
it is installed). What a system does not tell is None or left out, and is never an error. Knows no
model and no benchmark. Units are in the names; clocks are in MHz.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import glob
import importlib
import importlib.metadata
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

CPU = "/sys/devices/system/cpu"
CGROUPS = "/sys/fs/cgroup"
INA3221 = "/sys/bus/i2c/drivers"
SEEN_CORES = 8  # whose clocks are read
INSTRUCTION_SETS = {  # by the flags of /proc/cpuinfo, any of which is enough
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx_vnni", "avx512_vnni"),
    "AMX": ("amx_tile",),
    "NEON": ("asimd", "neon"),
    "dot product": ("asimddp",),
    "I8MM": ("i8mm",),
    "SVE": ("sve",),
}
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
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
BOARD_ENERGY = "GPU board energy (NVML)"
QUOTA, CORE_HEAT = "container CPU quota", "CPU core heat"

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
        cuda = _asked(self._nvml, "nvmlSystemGetCudaDriverVersion_v2")
        return {
            "name": _plain(self._ask("nvmlDeviceGetName")),
            "driver": _plain(_asked(self._nvml, "nvmlSystemGetDriverVersion")),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "memory_bytes": None if memory is None else memory.total,
            "power_limit_watts": _scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "persistence_mode": None if persistence is None else bool(persistence),
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", sm),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", fast),
            "most_sm_mhz": self._ask("nvmlDeviceGetMaxClockInfo", sm),
            "most_memory_mhz": self._ask("nvmlDeviceGetMaxClockInfo", fast),
            "throttle_reasons": self.throttle_reasons(),
        }

    def gauges(self) -> dict[str, Gauge]:
        """What may be sampled, by name."""
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        asked: dict[str, Gauge] = {
            "sm_mhz": self._asking("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            "memory_mhz": self._asking("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            "celsius": self._asking("nvmlDeviceGetTemperature", sensor),
            "watts": lambda: _scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            "used_bytes": self.used_bytes,
            "process_bytes": self.process_bytes,
        }
        return {f"gpu{self.index}_{name}": gauge for name, gauge in asked.items()}

    def joules(self) -> float | None:
        """Of the board since the driver was loaded."""
        return _scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3)

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
        return _asked(self._nvml, name, self._handle, *arguments)


def _asked(nvml: Any, name: str, *arguments: Any) -> Any:
    """What a function of NVML says; None if this version or this GPU does not have it."""
    try:
        return getattr(nvml, name)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return None


def describe(hardware: Hardware | None = None) -> dict[str, Any]:
    """JSON-able: the machine as it is now, and the versions that matter."""
    import numpy
    import onnxruntime

    hardware = hardware or Hardware()
    cpuinfo = _cpuinfo(hardware)
    return {
        "processor": _processor(cpuinfo),
        "cores": usable_cores(),
        "machine_cores": os.cpu_count(),
        "cpu_quota_cores": cpu_quota(hardware),
        "instruction_sets": _instruction_sets(cpuinfo),
        "last_level_cache_bytes": last_level_cache(hardware),
        "memory_bytes": memory_bytes(hardware),
        "governor": hardware.text(f"{CPU}/cpu0/cpufreq/scaling_governor"),
        "cpu_mhz": cpu_mhz(hardware) or _number(cpuinfo.get("cpu MHz")),
        "load_average": _load_average(),
        "os": _os(hardware),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "onnxruntime": onnxruntime.__version__,
        "nuwa_runtime": _version("nuwa-runtime"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "board": hardware.text("/proc/device-tree/model"),
        "jetson": _jetson(hardware),
        "gpus": [gpu.describe() for gpu in hardware.gpus],
    }


def peak_memory(hardware: Hardware | None = None) -> dict[str, Any]:
    """JSON-able: bytes that this process had at most, and what GPUs have in use now.

    The most that a GPU had in use while something ran is Sampler's.
    """
    hardware = hardware or Hardware()
    return {
        "peak_process_bytes": _peak_of_process(hardware),
        "gpus": [
            {"gpu": gpu.index, "process_bytes": gpu.process_bytes(), "used_bytes": gpu.used_bytes()}
            for gpu in hardware.gpus
        ],
    }


def forget_peak() -> None:
    """Has Linux count this process' peak of memory anew; elsewhere it is that of all its life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Sampler:
    """Looks at the machine `hertz` times a second in a thread of its own, from start to stop."""

    def __init__(self, hardware: Hardware | None = None, hertz: float = 2.0) -> None:
        """ValueError for hertz that are not positive."""
        if hertz <= 0:
            raise ValueError(f"hertz {hertz} is not positive")
        hardware = hardware or Hardware()
        self._interval = 1.0 / hertz
        self._gpus = hardware.gpus
        self._rails = rails(hardware)
        self._gauges = _gauges(hardware) | {
            name: gauge for gpu in self._gpus for name, gauge in gpu.gauges().items()
        }
        self._counters = {
            QUOTA: functools.partial(_quota_hits, hardware),
            CORE_HEAT: functools.partial(_core_heat, hardware),
        }
        self._series: dict[str, list[float]] = {}
        self._power: dict[str, list[tuple[float, float]]] = {}
        self._reasons: dict[str, None] = {}
        self._looks, self._seconds = 0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nuwa-sampler", daemon=True)

    def start(self) -> None:
        """Once; takes the first look."""
        self._began = time.perf_counter()
        self._counted = {name: counter() for name, counter in self._counters.items()}
        self._joules = [gpu.joules() for gpu in self._gpus]
        self._look()
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """JSON-able: least, median and most of what was seen; energy by where it was measured;
        what kept clocks down or took time away. own_seconds: that looking took.
        """
        self._over.set()
        self._thread.join()
        self._look()
        return {
            "seconds": time.perf_counter() - self._began,
            "looks": self._looks,
            "own_seconds": self._seconds,
            "seen": {name: _summary(values) for name, values in sorted(self._series.items())},
            "energy": [*self._board_energy(), *self._rail_energy()],
            "throttled": [*self._reasons, *self._counted_up()],
        }

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._look()

    def _look(self) -> None:
        began = time.perf_counter()
        for name, gauge in self._gauges.items():
            if (value := gauge()) is not None:
                self._series.setdefault(name, []).append(value)
        for name, rail in self._rails.items():
            if (watts := rail()) is not None:
                self._series.setdefault(f"rail_{name}_watts", []).append(watts)
                self._power.setdefault(name, []).append((time.perf_counter(), watts))
        for gpu in self._gpus:
            found = (reason for reason in gpu.throttle_reasons() if reason != IDLE)
            self._reasons |= {f"GPU {gpu.index}: {reason}": None for reason in found}
        self._looks += 1
        self._seconds += time.perf_counter() - began

    def _board_energy(self) -> Iterator[dict[str, Any]]:
        for gpu, before in zip(self._gpus, self._joules, strict=True):
            after = gpu.joules()
            if before is not None and after is not None:
                yield {"of": BOARD_ENERGY, "gpu": gpu.index, "joules": after - before}

    def _rail_energy(self) -> Iterator[dict[str, Any]]:
        for name, seen in self._power.items():
            joules = sum(
                (later - earlier) * (power + next_power) / 2
                for (earlier, power), (later, next_power) in itertools.pairwise(seen)
            )
            yield {"of": f"rail {name} (INA3221, sampled)", "joules": joules}

    def _counted_up(self) -> list[str]:
        return [
            name
            for name, counter in self._counters.items()
            if (before := self._counted[name]) is not None
            and (after := counter()) is not None
            and after > before
        ]


def last_level_cache(hardware: Hardware) -> int | None:
    """Bytes of the processor's last level of caches, all of them together."""
    found: dict[int, dict[str, int]] = {}
    for folder in hardware.paths(f"{CPU}/cpu[0-9]*/cache/index[0-9]*"):
        level, size = hardware.text(f"{folder}/level"), hardware.text(f"{folder}/size")
        match = re.fullmatch(r"(\d+)([KM])", size or "")
        if level is None or match is None:
            continue
        shared = hardware.text(f"{folder}/shared_cpu_list") or folder
        found.setdefault(int(level), {})[shared] = int(match[1]) << {"K": 10, "M": 20}[match[2]]
    return sum(found[max(found)].values()) if found else None


def memory_bytes(hardware: Hardware) -> int | None:
    """Of the whole machine."""
    match = re.search(r"MemTotal:\s+(\d+) kB", hardware.text("/proc/meminfo") or "")
    return None if match is None else 1024 * int(match[1])


def cpu_quota(hardware: Hardware) -> float | None:
    """Cores' worth of time that control groups leave this process; None for no limit."""
    quotas = []
    for folder in _control_groups(hardware):
        both = (hardware.text(f"{folder}/cpu.max") or "").split()
        if not both:  # version 1
            files = (f"{folder}/cpu.cfs_{part}_us" for part in ("quota", "period"))
            both = [hardware.text(file) or "" for file in files]
        quota, period = (_number(part) for part in both)
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def cpu_mhz(hardware: Hardware) -> float | None:
    """The mean clock of the first cores now."""
    files = hardware.paths(f"{CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq")[:SEEN_CORES]
    clocks = [clock for clock in map(_number, map(hardware.text, files)) if clock is not None]
    return statistics.mean(clocks) / 1000 if clocks else None


def rails(hardware: Hardware) -> dict[str, Gauge]:
    """Watts of each power rail that an INA3221 measures, as boards like Jetson have them."""
    found: dict[str, Gauge] = {}
    for label in hardware.paths(f"{INA3221}/ina3221/*/hwmon/hwmon*/in[0-9]*_label"):
        folder, channel = label.rsplit("/in", 1)
        number = channel.removesuffix("_label")
        volts, amperes = f"{folder}/in{number}_input", f"{folder}/curr{number}_input"
        name = hardware.text(label)
        if name and name != "NC" and hardware.text(amperes) is not None:
            found[name] = functools.partial(_watts, hardware, volts, amperes)
    for label in hardware.paths(f"{INA3221}/ina3221x/*/iio:device*/rail_name_*"):  # older kernels
        folder, number = label.rsplit("/rail_name_", 1)
        if name := hardware.text(label):
            found[name] = functools.partial(
                _reading, hardware, f"{folder}/in_power{number}_input", 1e-3
            )
    return found


def _watts(hardware: Hardware, volts: str, amperes: str) -> float | None:
    """From millivolts and milliamperes."""
    pair = _number(hardware.text(volts)), _number(hardware.text(amperes))
    return None if pair[0] is None or pair[1] is None else pair[0] * pair[1] * 1e-6


def _gauges(hardware: Hardware) -> dict[str, Gauge]:
    """What may be sampled of a processor and of a board, by name."""
    found: dict[str, Gauge] = {"cpu_mhz": functools.partial(cpu_mhz, hardware)}
    if (sensor := _cpu_sensor(hardware)) is not None:
        found["cpu_celsius"] = functools.partial(_reading, hardware, sensor, 1e-3)
    for file in hardware.paths("/sys/class/devfreq/*/cur_freq"):
        name = file.split("/")[-2]
        found[f"{name}_mhz"] = functools.partial(_reading, hardware, file, 1e-6)
    return found


def _cpu_sensor(hardware: Hardware) -> str | None:
    """The file of the processor's temperature, in thousandths of a degree."""
    for kind in hardware.paths("/sys/class/thermal/thermal_zone*/type"):
        if re.search("cpu|pkg", hardware.text(kind) or "", re.IGNORECASE):
            return f"{kind.removesuffix('type')}temp"
    for name in hardware.paths("/sys/class/hwmon/hwmon*/name"):
        if hardware.text(name) in CPU_SENSORS:
            return f"{name.removesuffix('name')}temp1_input"
    return None


def _control_groups(hardware: Hardware) -> list[str]:
    """Folders of the control groups that limit this process's time, the innermost first."""
    folders = []
    for line in (hardware.text("/proc/self/cgroup") or "").splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        inner = PurePosixPath(CGROUPS, "cpu" if controllers else "", path.lstrip("/"))
        folders += [str(each) for each in (inner, *inner.parents) if each.is_relative_to(CGROUPS)]
    return folders


def _quota_hits(hardware: Hardware) -> float | None:
    """How often this process's control group had used up its time."""
    for folder in _control_groups(hardware):
        match = re.search(r"nr_throttled (\d+)", hardware.text(f"{folder}/cpu.stat") or "")
        if match is not None:
            return float(match[1])
    return None


def _core_heat(hardware: Hardware) -> float | None:
    """How often cores were slowed down because they were hot."""
    files = hardware.paths(f"{CPU}/cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [count for count in map(_number, map(hardware.text, files)) if count is not None]
    return sum(counts) if counts else None


def _cpuinfo(hardware: Hardware) -> dict[str, str]:
    """The first processor's fields."""
    fields: dict[str, str] = {}
    for line in (hardware.text("/proc/cpuinfo") or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _processor(cpuinfo: dict[str, str]) -> str:
    named = (cpuinfo[name] for name in ("model name", "Model", "Hardware") if name in cpuinfo)
    return next(named, platform.processor() or platform.machine())


def _instruction_sets(cpuinfo: dict[str, str]) -> list[str]:
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    if not flags and platform.machine() == "arm64":  # not Linux; every such processor has it
        flags = {"asimd"}
    return [name for name, any_of in INSTRUCTION_SETS.items() if flags.intersection(any_of)]


def usable_cores() -> int:
    """Those that this process may run on; a quota of its time is another matter."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def _os(hardware: Hardware) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', hardware.text("/etc/os-release") or "", re.M)
    return match[1] if match else f"{platform.system()} {platform.version()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _jetson(hardware: Hardware) -> dict[str, Any] | None:
    if not re.search("NVIDIA|Jetson", hardware.text("/proc/device-tree/model") or ""):
        return None
    release = hardware.text("/etc/nv_tegra_release")
    return {
        "release": release.splitlines()[0] if release else None,
        "power_mode": _power_mode(hardware),
        "rails_watts": {name: rail() for name, rail in rails(hardware).items()},
    }


def _power_mode(hardware: Hardware) -> str | None:
    """The name of nvpmodel's mode; if it cannot be asked, by its state and its table."""
    said = re.search(r"Power Mode:\s*(\S+)", hardware.answer("nvpmodel", "-q") or "")
    if said:
        return said[1]
    table = hardware.text("/etc/nvpmodel.conf") or ""
    now = re.search(r"pmode:(\d+)", hardware.text("/var/lib/nvpmodel/status") or "")
    now = now or re.search(r"PM_CONFIG DEFAULT=(\d+)", table)
    names = {int(m[1]): m[2] for m in re.finditer(r"POWER_MODEL ID=(\d+) NAME=(\S+)", table)}
    return None if now is None else names.get(int(now[1]), str(int(now[1])))


def _peak_of_process(hardware: Hardware) -> int | None:
    match = re.search(r"VmHWM:\s+(\d+) kB", hardware.text("/proc/self/status") or "")
    if match is not None:
        return 1024 * int(match[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _reading(hardware: Hardware, path: str, scale: float) -> float | None:
    return _scaled(_number(hardware.text(path)), scale)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _plain(text: Any) -> Any:
    """Older versions of pynvml answer in bytes."""
    return text.decode() if isinstance(text, bytes) else text


def _summary(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}
