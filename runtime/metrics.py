"""What a server tells of itself to Prometheus: histograms of every phase, gauges, counters.

Knows events and errors, no wire format. Names follow Prometheus' conventions: base units, and
histograms in place of averages, so that percentiles over several servers can be had.
"""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from nuwa.spec.tasks import Task

from .core import (
    Accepted,
    CancelledError,
    Done,
    Event,
    Frame,
    QueueFullError,
    UnsupportedTaskError,
)
from .errors import (
    DeadlineExceededError,
    DeadlineTooShortError,
    EngineError,
    ShuttingDownError,
)
from .statistics import Statistics

OK = "ok"
AGAIN = "kept"  # the answer to an earlier call was given again
# How a request ended, by the first class that its error is of.
OUTCOMES: tuple[tuple[type[Exception], str], ...] = (
    (DeadlineExceededError, "deadline"),
    (CancelledError, "cancelled"),
    (QueueFullError, "queue_full"),
    (DeadlineTooShortError, "deadline_too_short"),
    (ShuttingDownError, "shutting_down"),
    (UnsupportedTaskError, "unsupported"),
    (EngineError, "engine"),
    (ValueError, "invalid"),
)
OTHER = "internal"
REQUEST_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
STEP_BUCKETS = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03),
    *(0.04, 0.05, 0.06, 0.08, 0.1, 0.2, 0.5, 1),
)


def outcome_of(error: BaseException) -> str:
    return next((name for kind, name in OUTCOMES if isinstance(error, kind)), OTHER)


class Metrics:
    """registry: where they are read; statistics: sums by model and task.

    Safe to use from any thread.
    """

    def __init__(self) -> None:
        self.registry, self.statistics = CollectorRegistry(), Statistics()
        tasks, r = ["model", "task"], self.registry
        self._requests = Counter(
            "nuwa_requests", "Requests that ended, by how", ["model", "task", "outcome"], registry=r
        )
        self._errors = Counter(
            "nuwa_errors", "Errors that clients were told of", ["reason"], registry=r
        )
        self._duration = _histogram(
            "nuwa_request_duration", "From call to end, however it ends", tasks, r
        )
        self._phases = {
            name: _histogram(f"nuwa_{name}_duration", help, tasks, r)
            for name, help in (
                ("queue", "Waiting for the first slot"),
                ("encode", "Encoding text, sketch and given pictures"),
                ("decode", "Decode steps that a request took part in"),
                ("prefill", "Those of them that only caught up with given tokens"),
                ("pixels", "Turning its tokens into pixels"),
                ("ranking", "Scoring its samples"),
            )
        }
        self._first = _histogram("nuwa_time_to_first_frame", "From call to first frame", tasks, r)
        self._frames = Counter("nuwa_frames_generated", "Frames handed out", tasks, registry=r)
        self._steps = Histogram(
            "nuwa_step_duration_seconds",
            "One decode step",
            ["model"],
            buckets=STEP_BUCKETS,
            registry=r,
        )
        self._cancel = Histogram(
            "nuwa_cancel_latency_seconds",
            "From a cancellation to its effect",
            ["model"],
            buckets=STEP_BUCKETS,
            registry=r,
        )

    def collect(self, collector: Any) -> None:
        """Has an object asked for what it knows, whenever metrics are read."""
        self.registry.register(collector)

    def step(self, model: str, seconds: float) -> None:
        """A decode step."""
        self._steps.labels(model).observe(seconds)

    def cancelled(self, model: str, seconds: float) -> None:
        """A request that held a slot let go of it so long after it was cancelled."""
        self._cancel.labels(model).observe(seconds)

    def refused(self, model: str, error: Exception) -> None:
        """A request that was refused before it was known what it asks for."""
        self._requests.labels(model, "none", outcome_of(error)).inc()

    def answered_again(self, model: str, task: Task) -> None:
        """A call that got an answer which was made for another one: it has no phases."""
        self._requests.labels(model, str(task), AGAIN).inc()

    def error(self, reason: str) -> None:
        """An error that a client was told of, whether or not there was a request yet."""
        self._errors.labels(reason).inc()

    def begin(self, model: str, task: Task, title: str) -> Meter:
        """A request that begins now. model: its name; title: that with its version."""
        return Meter(self, model, task, title)


class Meter:
    """Follows one request from its beginning to its end."""

    def __init__(self, metrics: Metrics, model: str, task: Task, title: str) -> None:
        self._metrics, self._key = metrics, (title, task)
        self._labels = (model, str(task))
        self._started = time.perf_counter()
        self._first = True
        self._accepted = self._ended = False

    def heard(self, event: Event) -> None:
        """An event of it, in order; Done ends it well."""
        metrics = self._metrics
        if isinstance(event, Accepted):
            if not self._accepted:
                self._waited(event.queue_seconds)
        elif isinstance(event, Frame):
            metrics._frames.labels(*self._labels).inc()
            if self._first:
                self._first = False
                metrics._first.labels(*self._labels).observe(self._seconds())
        elif isinstance(event, Done):
            for name, phase in metrics._phases.items():
                seconds = getattr(event.timings, name)
                if name == "queue" or (name in ("ranking", "prefill") and not seconds):
                    continue
                phase.labels(*self._labels).observe(seconds)
            metrics.statistics.add(self._key, event.timings)
            self._end(OK)

    def failed(self, error: BaseException) -> None:
        """It ended by this error."""
        if not self._ended:
            if not self._accepted:
                self._waited(self._seconds())
            self._metrics.statistics.fail(self._key, self._seconds())
            self._end(outcome_of(error))

    def _waited(self, seconds: float) -> None:
        self._accepted = True
        self._metrics._phases["queue"].labels(*self._labels).observe(seconds)

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _end(self, outcome: str) -> None:
        self._ended = True
        self._metrics._duration.labels(*self._labels).observe(self._seconds())
        self._metrics._requests.labels(*self._labels, outcome).inc()


def _histogram(name: str, help: str, labels: list[str], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"{name}_seconds", help, labels, buckets=REQUEST_BUCKETS, registry=registry)
