"""The last minutes of a server in a few figures: what the status page draws.

Read from the same registry as Prometheus' metrics, so that both say the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from .process import resident_megabytes

log = logging.getLogger("nuwa.runtime")

INTERVAL = 2.0  # seconds between points
POINTS = 450


@dataclass(frozen=True)
class Buckets:
    """A histogram: how many values were at most each bound, the last of which is infinity."""

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()

    def since(self, earlier: Buckets) -> Buckets:
        """Of what came after `earlier`."""
        if not earlier.bounds:
            return self
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Buckets(self.bounds, tuple(now - then for now, then in pairs))

    @property
    def total(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    def quantile(self, share: float) -> float | None:
        """As Prometheus' histogram_quantile: even within a bucket; None where there is nothing.

        Beyond the last finite bound it is that bound.
        """
        if not self.total:
            return None
        wanted, below, lower = share * self.total, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= wanted and count > below:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * (wanted - below) / (count - below)
            below, lower = count, bound
        return lower


@dataclass(frozen=True)
class Point:
    """time: of time.monotonic; requests: ended so far, by outcome; frames: handed out so far;
    gauges: by name, summed over models.
    """

    time: float
    requests: dict[str, float] = field(default_factory=dict)
    frames: float = 0.0
    steps: Buckets = Buckets()
    durations: Buckets = Buckets()
    gauges: dict[str, float] = field(default_factory=dict)


MEMORY = "megabytes"  # of the process, beside the gauges of the registry
GAUGES = ("nuwa_slots", "nuwa_slots_used", "nuwa_requests_waiting", "nuwa_queue_size")


def read_point(registry: CollectorRegistry, now: float) -> Point:
    """What the registry says now."""
    requests: dict[str, float] = {}
    gauges = dict.fromkeys(GAUGES, 0.0)
    frames, samples = 0.0, {}
    for family in registry.collect():
        samples[family.name] = family.samples
        if family.name in gauges:
            gauges[family.name] = sum(sample.value for sample in family.samples)
    for sample in samples.get("nuwa_requests", ()):
        if sample.name == "nuwa_requests_total":
            outcome = sample.labels["outcome"]
            requests[outcome] = requests.get(outcome, 0.0) + sample.value
    for sample in samples.get("nuwa_frames_generated", ()):
        if sample.name.endswith("_total"):
            frames += sample.value
    return Point(
        now,
        requests,
        frames,
        buckets_of(samples.get("nuwa_step_duration_seconds", ())),
        buckets_of(samples.get("nuwa_request_duration_seconds", ())),
        gauges,
    )


def buckets_of(samples: Iterable, **labels: str) -> Buckets:
    """A histogram's samples, summed over all that have these labels."""
    found: dict[float, float] = {}
    for sample in samples:
        if sample.name.endswith("_bucket") and labels.items() <= sample.labels.items():
            bound = float(sample.labels["le"])
            found[bound] = found.get(bound, 0.0) + sample.value
    bounds = tuple(sorted(found))
    return Buckets(bounds, tuple(found[bound] for bound in bounds))


class History:
    """The latest POINTS of `take`, one every INTERVAL. start() and close()."""

    def __init__(self, take: Callable[[], Point]) -> None:
        self._take = take
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="nuwa-history", daemon=True)

    @property
    def points(self) -> Sequence[Point]:
        return list(self._points)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Harmless if it was never started."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Takes a point now."""
        self._points.append(self._take())

    def _loop(self) -> None:
        while True:
            try:
                self.look()
            except Exception:
                log.exception("the history has a gap")
            if self._closing.wait(INTERVAL):
                return


def taken(registry: CollectorRegistry) -> Callable[[], Point]:
    """For History: what the registry says, and the memory of this process."""

    def take() -> Point:
        point = read_point(registry, time.monotonic())
        point.gauges[MEMORY] = resident_megabytes()
        return point

    return take
