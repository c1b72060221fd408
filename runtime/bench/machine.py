"""What machine a number belongs to: processor, caches, memory, quotas, boards, GPUs, versions.

Knows no model and no benchmark. What a system does not tell is None. Clocks are in MHz.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import sys
from pathlib import PurePosixPath
from typing import Any

from .energy import rails
from .hardware import Hardware, number

CPU = "/sys/devices/system/cpu"
CGROUPS = "/sys/fs/cgroup"
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
        "cpu_mhz": cpu_mhz(hardware) or number(cpuinfo.get("cpu MHz")),
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


def available_bytes(hardware: Hardware) -> int | None:
    """What of it processes can still have: of the whole machine, or of the control group."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", hardware.text("/proc/meminfo") or "")
    free = [] if match is None else [1024 * int(match[1])]
    for folder in control_groups(hardware):
        limit = number(hardware.text(f"{folder}/memory.max"))
        used = number(hardware.text(f"{folder}/memory.current"))
        if limit is not None and used is not None:
            free.append(max(0, int(limit - used)))
    return min(free, default=None)


def cpu_quota(hardware: Hardware) -> float | None:
    """Cores' worth of time that control groups leave this process; None for no limit."""
    quotas = []
    for folder in control_groups(hardware):
        both = (hardware.text(f"{folder}/cpu.max") or "").split()
        if not both:  # version 1
            files = (f"{folder}/cpu.cfs_{part}_us" for part in ("quota", "period"))
            both = [hardware.text(file) or "" for file in files]
        quota, period = (number(part) for part in both)
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def cpu_mhz(hardware: Hardware) -> float | None:
    """The mean clock of the first cores now."""
    files = hardware.paths(f"{CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq")[:SEEN_CORES]
    clocks = [clock for clock in map(number, map(hardware.text, files)) if clock is not None]
    return statistics.mean(clocks) / 1000 if clocks else None


def control_groups(hardware: Hardware) -> list[str]:
    """Folders of the control groups that limit this process's time, the innermost first."""
    folders = []
    for line in (hardware.text("/proc/self/cgroup") or "").splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        inner = PurePosixPath(CGROUPS, "cpu" if controllers else "", path.lstrip("/"))
        folders += [str(each) for each in (inner, *inner.parents) if each.is_relative_to(CGROUPS)]
    return folders


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
    return len(usable_core_numbers() or ()) or os.cpu_count() or 1


def usable_core_numbers() -> set[int] | None:
    """Their numbers; None where the system does not tell."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else None


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
