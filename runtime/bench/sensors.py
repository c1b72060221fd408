"""What may be looked at of a machine while it works: clocks, temperatures, and what is counted up.

Temperatures are of the processor, of a Jetson's GPU and hottest junction ("tj"), and of its chip.
"""

from __future__ import annotations

import functools
import re

from .hardware import Gauge, Hardware, number, reading
from .machine import CPU, control_groups, cpu_mhz, usable_core_numbers

CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
ZONES = r"(cpu|pkg|gpu|tj|soc)\w*"  # types of thermal zones that are read
QUOTA, CORE_HEAT = "container CPU quota", "CPU core heat"
BUSY, OWN, STOLEN, SWITCHES = "busy", "own", "stolen", "switches"  # see `processor_time`
TICKS = 100.0  # of /proc a second: USER_HZ, the same on every Linux


def gauges(hardware: Hardware) -> dict[str, Gauge]:
    """What may be sampled of a processor and of a board, by name."""
    found: dict[str, Gauge] = {"cpu_mhz": functools.partial(cpu_mhz, hardware)}
    for name, file in temperatures(hardware).items():
        found[name] = functools.partial(reading, hardware, file, 1e-3)
    for file in hardware.paths("/sys/class/devfreq/*/cur_freq"):
        name = file.split("/")[-2]
        found[f"{name}_mhz"] = functools.partial(reading, hardware, file, 1e-6)
    return found


def temperatures(hardware: Hardware) -> dict[str, str]:
    """Files in thousandths of a degree by name, "cpu_celsius"; of zones of one name the first."""
    found: dict[str, str] = {}
    for kind in hardware.paths("/sys/class/thermal/thermal_zone*/type"):
        match = re.search(ZONES, (hardware.text(kind) or "").replace("_", " "), re.IGNORECASE)
        if match:
            name = "cpu" if match[1].lower() == "pkg" else match[0].lower()
            found.setdefault(f"{name}_celsius", f"{kind.removesuffix('type')}temp")
    for name in hardware.paths("/sys/class/hwmon/hwmon*/name"):
        if hardware.text(name) in CPU_SENSORS:
            found.setdefault("cpu_celsius", f"{name.removesuffix('name')}temp1_input")
    return found


def hottest(hardware: Hardware) -> float | None:
    """Degrees of the hottest of them now."""
    files = temperatures(hardware).values()
    seen = [value for file in files if (value := reading(hardware, file, 1e-3)) is not None]
    return max(seen, default=None)


def slowdowns(hardware: Hardware) -> dict[str, Gauge]:
    """What counts how often this process, or a core, was held back."""
    return {
        QUOTA: functools.partial(_quota_hits, hardware),
        CORE_HEAT: functools.partial(_core_heat, hardware),
    }


def processor_time(hardware: Hardware) -> dict[str, float]:
    """Seconds so far of the cores that this process may use: BUSY, OWN (also of children that have
    ended), STOLEN by other virtual machines; SWITCHES: how often a thread of this process lost its
    core to another. Empty where /proc does not tell.
    """
    own = (hardware.text("/proc/self/stat") or "").rpartition(")")[2].split()
    cores = usable_core_numbers()
    lines = [line.split() for line in (hardware.text("/proc/stat") or "").splitlines()]
    each = [
        [float(ticks) / TICKS for ticks in line[1:9]]
        for line in lines
        if line
        and re.fullmatch(r"cpu\d+", line[0])
        and (cores is None or int(line[0][3:]) in cores)
    ]
    if len(own) < 15 or not each or any(len(core) < 8 for core in each):
        return {}
    user, nice, system, _, _, irq, soft, steal = (sum(kind) for kind in zip(*each, strict=True))
    found = {
        BUSY: user + nice + system + irq + soft,
        OWN: sum(float(ticks) for ticks in own[11:15]) / TICKS,
        STOLEN: steal,
    }
    if (switches := hardware.involuntary_switches()) is not None:
        found[SWITCHES] = switches
    return found


def _quota_hits(hardware: Hardware) -> float | None:
    """How often this process's control group had used up its time."""
    for folder in control_groups(hardware):
        match = re.search(r"nr_throttled (\d+)", hardware.text(f"{folder}/cpu.stat") or "")
        if match is not None:
            return float(match[1])
    return None


def _core_heat(hardware: Hardware) -> float | None:
    """How often cores were slowed down because they were hot."""
    files = hardware.paths(f"{CPU}/cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [count for count in map(number, map(hardware.text, files)) if count is not None]
    return sum(counts) if counts else None
