"""Where energy is measured: a GPU's board (NVML), a Jetson's rails (INA3221), a package (RAPL).

Each source is asked for the joules since it began to count; what is used meanwhile is a difference.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .hardware import Gauge, Gpu, Hardware, number, reading

INA3221 = "/sys/bus/i2c/drivers"
RAPL = "/sys/class/powercap"
BOARD_ENERGY = "GPU board energy (NVML)"
PACKAGE_ENERGY = "processor package energy (RAPL)"
RAIL_ENERGY = "rail {} (INA3221, sampled)"
WHOLE_RAILS = ("VDD_IN", "POM_5V_IN")  # that all others of a board come after
IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class Source:
    """joules: so far, None where it does not tell; gpu: whose board."""

    of: str
    joules: Gauge
    gpu: int | None = None

    @property
    def about(self) -> dict[str, Any]:
        return {"of": self.of} | ({} if self.gpu is None else {"gpu": self.gpu})


def sources(hardware: Hardware, gpus: Iterable[Gpu]) -> list[Source]:
    """All that this machine has, of these GPUs."""
    found = [Source(BOARD_ENERGY, gpu.joules, gpu.index) for gpu in gpus]
    found += [
        Source(RAIL_ENERGY.format(name), _Summed(rail)) for name, rail in rails(hardware).items()
    ]
    for folder in hardware.paths(f"{RAPL}/intel-rapl:*"):
        name = hardware.text(f"{folder}/name") or ""
        if name.startswith("package"):
            found.append(Source(f"{PACKAGE_ENERGY}, {name}", _Unwrapped(hardware, folder)))
    return [source for source in found if source.joules() is not None]


def counted(energy: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of what was measured that which answers are charged with: GPU boards, else all of a Jetson
    board, else processor packages; the sum where there are several. None for nothing.
    """
    rails_of = [each for each in energy if "INA3221" in each["of"]]
    whole = [each for each in rails_of if any(f" {name} " in each["of"] for name in WHOLE_RAILS)]
    for kind in (
        [each for each in energy if each["of"] == BOARD_ENERGY],
        whole or rails_of,
        [each for each in energy if each["of"].startswith(PACKAGE_ENERGY)],
    ):
        if kind:
            names = list(dict.fromkeys(each["of"] for each in kind))
            return {"of": " + ".join(names), "joules": sum(each["joules"] for each in kind)}
    return None


def idle_watts(found: list[Source], seconds: float = IDLE_SECONDS) -> dict[str, float]:
    """Of each source, by what it measures, while this process waits; takes so long, unless there
    is no source.
    """
    if not found:
        return {}
    before, began = [source.joules() for source in found], time.perf_counter()
    time.sleep(seconds)
    after, taken = [source.joules() for source in found], time.perf_counter() - began
    watts: dict[str, float] = {}
    for source, first, last in zip(found, before, after, strict=True):
        if first is not None and last is not None:
            watts[source.of] = watts.get(source.of, 0.0) + (last - first) / taken
    return watts


def rails(hardware: Hardware) -> dict[str, Gauge]:
    """Watts of each power rail that an INA3221 measures, as boards like Jetson have them."""
    found: dict[str, Gauge] = {}
    for label in hardware.paths(f"{INA3221}/ina3221/*/hwmon/hwmon*/in[0-9]*_label"):
        folder, channel = label.rsplit("/in", 1)
        index = channel.removesuffix("_label")
        volts, amperes = f"{folder}/in{index}_input", f"{folder}/curr{index}_input"
        name = hardware.text(label)
        if name and name != "NC" and hardware.text(amperes) is not None:
            found[name] = functools.partial(_watts, hardware, volts, amperes)
    for label in hardware.paths(f"{INA3221}/ina3221x/*/iio:device*/rail_name_*"):  # older kernels
        folder, index = label.rsplit("/rail_name_", 1)
        if name := hardware.text(label):
            found[name] = functools.partial(
                reading, hardware, f"{folder}/in_power{index}_input", 1e-3
            )
    return found


def _watts(hardware: Hardware, volts: str, amperes: str) -> float | None:
    """From millivolts and milliamperes."""
    pair = number(hardware.text(volts)), number(hardware.text(amperes))
    return None if pair[0] is None or pair[1] is None else pair[0] * pair[1] * 1e-6


class _Summed:
    """Joules of a gauge of watts: between two looks half of each counts."""

    def __init__(self, watts: Gauge) -> None:
        self._watts, self._sum = watts, 0.0
        self._last: tuple[float, float] | None = None

    def __call__(self) -> float | None:
        now, watts = time.perf_counter(), self._watts()
        if watts is None:
            return None
        if self._last is not None:
            self._sum += (now - self._last[0]) * (watts + self._last[1]) / 2
        self._last = now, watts
        return self._sum


class _Unwrapped:
    """Joules of a RAPL counter, which begins again after its largest value."""

    def __init__(self, hardware: Hardware, folder: str) -> None:
        self._hardware, self._file = hardware, f"{folder}/energy_uj"
        self._range = number(hardware.text(f"{folder}/max_energy_range_uj")) or 0.0
        self._last: float | None = None
        self._sum = 0.0

    def __call__(self) -> float | None:
        now = number(self._hardware.text(self._file))
        if now is None:
            return None
        if self._last is not None:
            self._sum += (now - self._last) + (self._range if now < self._last else 0.0)
        self._last = now
        return self._sum * 1e-6
