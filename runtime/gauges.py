"""What metrics say of a server at the moment when they are read."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

if TYPE_CHECKING:
    from .server import Server

MODEL = ["model", "version"]


class Gauges:
    """A collector of prometheus_client."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing that could be asked for already."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        server = self._server
        for name, help, value in (
            ("nuwa_ready", "1 while requests are taken", float(server.is_ready())),
            ("nuwa_calls_open", "Generations being answered", server.intake.open_calls),
            (
                "nuwa_engine_busy_seconds",
                "Of the call that has lasted longest",
                server.busy_seconds(),
            ),
        ):
            yield GaugeMetricFamily(name, help, value)
        slots = GaugeMetricFamily("nuwa_slots", "Slots there are", labels=MODEL)
        used = GaugeMetricFamily("nuwa_slots_used", "Slots that decode a sample", labels=MODEL)
        waiting = GaugeMetricFamily(
            "nuwa_requests_waiting", "Requests that wait for a slot", labels=MODEL
        )
        room = GaugeMetricFamily("nuwa_queue_size", "Requests that may wait", labels=MODEL)
        about = InfoMetricFamily("nuwa_model", "What is served", labels=MODEL)
        for each in server.host.loaded:
            labels, info = [each.name, str(each.version)], each.engine.info
            slots.add_metric(labels, each.engine.slots)
            used.add_metric(labels, each.scheduler.active)
            waiting.add_metric(labels, each.scheduler.queued)
            room.add_metric(labels, each.scheduler.queue_size)
            said = {
                "bundle": info.bundle_hash,
                "precision": info.precision,
                "backend": info.backend,
                "runs_on": info.runs_on,
            }
            about.add_metric(labels, said)
        yield from (slots, used, waiting, room, about)
        version = importlib.metadata.version("nuwa-runtime")
        yield InfoMetricFamily("nuwa_runtime", "This program", {"version": version})
