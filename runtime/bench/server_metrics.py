"""What a server counted meanwhile, by its own metrics: phases of requests and decode steps.

Its page for Prometheus is read before and after; what is in between is everybody's, not this
client's alone. Histograms have buckets, so a quantile is known to lie between two of their edges.
"""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT = 10.0
REQUEST = "nuwa_request_duration_seconds"
STEP = "nuwa_step_duration_seconds"
FIRST_FRAME = "nuwa_time_to_first_frame_seconds"
PREFIX, SUFFIX = "nuwa_", "_duration_seconds"
QUANTILES = (0.5, 0.9, 0.99)

Buckets = dict[float, float]  # by upper edge, how many were at most so long


@dataclass(frozen=True)
class Histogram:
    count: float
    total: float
    buckets: Buckets

    def since(self, earlier: Histogram | None) -> Histogram:
        """What came after an earlier one; of a server that was started anew, all."""
        if earlier is None or earlier.count > self.count:
            return self
        buckets = {edge: many - earlier.buckets.get(edge, 0) for edge, many in self.buckets.items()}
        return Histogram(self.count - earlier.count, self.total - earlier.total, buckets)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; quantiles as the edges that they lie between, high None beyond the last."""
        return {
            "unit": "s",
            "count": int(self.count),
            "mean": self.total / self.count,
            "quantiles": {str(share): self._between(share) for share in QUANTILES},
            "buckets": [
                [edge if math.isfinite(edge) else None, int(many)]
                for edge, many in sorted(self.buckets.items())
            ],
        }

    def _between(self, share: float) -> dict[str, float | None]:
        low = 0.0
        for edge, many in sorted(self.buckets.items()):
            if many >= share * self.count:
                return {"low": low, "high": edge if math.isfinite(edge) else None}
            low = edge
        return {"low": low, "high": None}


def read(address: str) -> str:
    """The page of a server whose metrics are at HOST:PORT; ValueError says why it cannot be had."""
    try:
        # Straight there: a proxy of the environment's is for elsewhere.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address}/metrics", timeout=TIMEOUT) as answer:
            return str(answer.read().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no metrics at {address}: {error}") from None


def difference(before: str, after: str, model: str, task: str) -> dict[str, Any]:
    """JSON-able: what two such pages say of the requests in between.

    requests: how many of that model and task ended; phases: of these by name; steps: of the model,
    or of the server where it does not tell them apart. Phases and steps that there were none of are
    left out.
    """
    wanted = {"model": model, "task": task}
    first, last = _histograms(before, wanted), _histograms(after, wanted)
    found = {name: one.since(first.get(name)) for name, one in last.items()}
    told = {name: one.to_json() for name, one in found.items() if one.count > 0}
    phases = {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): one
        for name, one in told.items()
        if name.endswith(SUFFIX) and name not in (REQUEST, STEP)
    }
    if FIRST_FRAME in told:
        phases["time_to_first_frame"] = told[FIRST_FRAME]
    ended = found.get(REQUEST)
    return {
        "requests": int(ended.count) if ended else 0,
        "phases": phases,
        "steps": told.get(STEP),
    }


def _histograms(page: str, wanted: Mapping[str, str]) -> dict[str, Histogram]:
    """By name, of the series that say nothing else of what is wanted; several are added up."""
    found: dict[str, Histogram] = {}
    for family in text_string_to_metric_families(page):
        if family.type != "histogram" or not family.name.startswith(PREFIX):
            continue
        samples = [
            sample
            for sample in family.samples
            if all(sample.labels.get(name, value) == value for name, value in wanted.items())
        ]
        found[family.name] = _histogram(family.name, samples)
    return found


def _histogram(name: str, samples: Iterable[Any]) -> Histogram:
    count = total = 0.0
    buckets: Buckets = {}
    for sample in samples:
        if sample.name == f"{name}_count":
            count += sample.value
        elif sample.name == f"{name}_sum":
            total += sample.value
        elif sample.name == f"{name}_bucket":
            edge = float(sample.labels["le"])
            buckets[edge] = buckets.get(edge, 0.0) + sample.value
    return Histogram(count, total, buckets)
