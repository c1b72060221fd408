"""Looks at the machine while it is measured: clocks, heat, throttling, energy, others' work.

What only counts up is kept with the time of each look, so that it can be told of any span within.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import energy, sensors
from .hardware import IDLE, Gpu, Hardware
from .machine import usable_cores

Series = list[tuple[float, float]]  # (time.perf_counter, what was counted until then)


class Sampler:
    """Looks `hertz` times a second in a thread of its own, from start to stop.

    gpus: that are looked at, by default all. What an allocator keeps is seen however seldom it
    looks; a peak of GPU memory that is given back between two looks is not.
    """

    def __init__(
        self,
        hardware: Hardware | None = None,
        hertz: float = 2.0,
        gpus: Sequence[Gpu] | None = None,
    ) -> None:
        """ValueError for hertz that are not positive."""
        if hertz <= 0:
            raise ValueError(f"hertz {hertz} is not positive")
        self._hardware = hardware or Hardware()
        self._interval = 1.0 / hertz
        self._gpus = list(self._hardware.gpus if gpus is None else gpus)
        self._sources = energy.sources(self._hardware, self._gpus)
        self._rails = energy.rails(self._hardware)
        self._gauges = sensors.gauges(self._hardware) | {
            name: gauge for gpu in self._gpus for name, gauge in gpu.gauges().items()
        }
        self._gauges |= {f"rail_{name}_watts": rail for name, rail in self._rails.items()}
        self._counters = sensors.slowdowns(self._hardware)
        self._series: dict[str, list[float]] = {}
        self._joules: list[Series] = [[] for _ in self._sources]
        self._time: dict[str, Series] = {}
        self._reasons: dict[str, None] = {}
        self._looks, self._seconds = 0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nuwa-sampler", daemon=True)

    def start(self) -> None:
        """Once; takes the first look."""
        self._began = time.perf_counter()
        self._counted = {name: counter() for name, counter in self._counters.items()}
        self._look()
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """JSON-able: least, median and most of what was seen, of temperatures the first and the
        last, too; energy by where it was measured; what kept clocks down or took time away.
        own_seconds: that looking took.
        """
        self._over.set()
        self._thread.join()
        self._look()
        now = time.perf_counter()
        return {
            "seconds": now - self._began,
            "looks": self._looks,
            "own_seconds": self._seconds,
            "seen": {name: _summary(name, values) for name, values in sorted(self._series.items())},
            "energy": self.energy(self._began, now),
            "throttled": [*self._reasons, *self._counted_up()],
        }

    def energy(self, start: float, end: float) -> list[dict[str, Any]]:
        """Joules of each source within a span of time.perf_counter; between two looks evenly."""
        return [
            source.about | {"joules": joules}
            for source, series in zip(self._sources, self._joules, strict=True)
            if (joules := between(series, start, end)) is not None
        ]

    def contention(self, start: float, end: float) -> dict[str, float]:
        """What others took of the cores that this process may use within a span: others_cores and
        stolen_cores, in cores; others_share: both, as a share of these cores;
        involuntary_switches_per_second: of this process's threads. Empty where it is not known.
        """
        spent = {name: between(series, start, end) for name, series in self._time.items()}
        busy, own, stolen = (
            spent.get(kind) for kind in (sensors.BUSY, sensors.OWN, sensors.STOLEN)
        )
        seconds = end - start
        if busy is None or own is None or stolen is None or seconds <= 0:
            return {}
        others = max(busy - own, 0.0) / seconds  # they are rounded to ticks
        cores = usable_cores()
        found = {
            "others_cores": others,
            "stolen_cores": stolen / seconds,
            "others_share": (others + stolen / seconds) / cores,
        }
        if (switches := spent.get(sensors.SWITCHES)) is not None:
            found["involuntary_switches_per_second"] = switches / seconds
        return found

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._look()

    def _look(self) -> None:
        began = time.perf_counter()
        for source, series in zip(self._sources, self._joules, strict=True):
            if (joules := source.joules()) is not None:
                series.append((time.perf_counter(), joules))
        spent, now = sensors.processor_time(self._hardware), time.perf_counter()
        for name, value in spent.items():
            self._time.setdefault(name, []).append((now, value))
        for name, gauge in self._gauges.items():
            if (seen := gauge()) is not None:
                self._series.setdefault(name, []).append(seen)
        for gpu in self._gpus:
            found = (reason for reason in gpu.throttle_reasons() if reason != IDLE)
            self._reasons |= {f"GPU {gpu.index}: {reason}": None for reason in found}
        self._looks += 1
        self._seconds += time.perf_counter() - began

    def _counted_up(self) -> list[str]:
        return [
            name
            for name, counter in self._counters.items()
            if (before := self._counted[name]) is not None
            and (after := counter()) is not None
            and after > before
        ]


def between(series: Series, start: float, end: float) -> float | None:
    """How much was counted from one moment to the other; None for fewer than two looks."""
    if len(series) < 2:
        return None
    times, values = zip(*series, strict=True)
    first, last = np.interp((start, end), times, values)
    return float(last - first)


def _summary(name: str, values: list[float]) -> dict[str, float]:
    found = {"least": min(values), "median": statistics.median(values), "most": max(values)}
    if name.endswith("_celsius"):
        found |= {"first": values[0], "last": values[-1]}
    return found
