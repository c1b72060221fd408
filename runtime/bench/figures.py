"""The figures of a result: metrics, phases, steps and a timeline of what was observed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .. import media
from ..convert import DEFAULT_FRAMES_PER_SECOND
from . import statistics
from .asking import Asker
from .observation import Observation
from .running import Seen, Settings
from .workload import Workload

EARLY = {"single-stream": 0.9, "multi-stream": 0.99}  # MLPerf's quantile of each
PHASES = ("queue", "encode", "decode", "pixels", "ranking")
SHOWN = 50  # requests of the timeline
ENCODINGS = 20  # of a frame, for what its file takes


def metrics(
    seen: Seen, workload: Workload, settings: Settings, floor: float | None
) -> dict[str, Any]:
    """Of the requests that were answered."""
    answered = [each for each in seen.all if each.ok]
    if not answered:
        return {}
    latencies = [each.latency for each in answered]
    found = {"latency": _summary(latencies)}
    if floor and settings.scenario == "single-stream":  # elsewhere there is waiting in it
        median = found["latency"]["quantiles"]["0.5"].get("value") or found["latency"]["mean"]
        found["latency"] |= {"floor": floor, "floor_fraction": floor / median}
    if settings.scenario in EARLY:
        share = EARLY[settings.scenario]
        stopped = statistics.early_stopping(latencies, share)
        known = {"value": stopped.value} if stopped.value else {"needs": stopped.needs}
        found[f"early_stopping_p{100 * share:g}"] = {"unit": "s", "better": "lower", **known}
    for name, value in series_of(workload, settings).items():
        values = [number for each in answered if (number := value(each)) is not None]
        if values:
            found[name] = _summary(values, *UNITS[name])
    rate = len(answered) / seen.seconds if seen.rate is None else seen.rate
    span = statistics.mean_interval(seen.rates) if seen.rates else None
    ends = {} if span is None else {"low": max(span[0], 0.0), "high": span[1]}
    if settings.scenario == "multi-stream":
        rate *= settings.streams
    found["throughput"] = {"unit": "1/s", "better": "higher", "value": rate, **ends}
    best = [each["rate"] for each in seen.load if each.get("best") and each["met"]]
    if best and settings.rate is None:
        found["highest_rate"] = {"unit": "1/s", "better": "higher", "value": best[0]}
    if settings.scenario == "single-stream" and settings.loadgen is None:
        between = 1 - sum(each.ended - each.sent for each in seen.all) / seen.seconds
        found["measuring"] = {"unit": "", "better": "lower", "value": max(between, 0.0)}
    return found


def realtime(each: Observation) -> float:
    """Seconds of video a second, where a clip is shown at the rate that files have."""
    return len(each.frames) / DEFAULT_FRAMES_PER_SECOND / each.latency


UNITS = {
    "time_to_first_frame": ("s", "lower"),
    "time_per_frame": ("s", "lower"),
    "realtime_factor": ("x", "higher"),
}


def series_of(
    workload: Workload, settings: Settings
) -> dict[str, Callable[[Observation], float | None]]:
    """What else a request of a clip has, by metric.

    Not of several at once, which are one observation; frames of ranked samples come all at the end.
    """
    if not workload.task.is_video or settings.scenario == "multi-stream":
        return {}
    found: dict[str, Callable[[Observation], float | None]] = {
        "time_to_first_frame": lambda each: each.time_to_first_frame
    }
    if workload.rank_by is None:
        found["time_per_frame"] = lambda each: each.time_per_frame
    return found | {"realtime_factor": realtime}


def in_rounds(seen: Seen, workload: Workload, settings: Settings) -> dict[str, list[list[float]]]:
    """Values by metric and round, for comparisons.

    Offline it is throughput that is compared, and of a search the rate that was found: latencies
    there depend on how many wait, and on the rate.
    """
    if seen.rates or settings.scenario == "offline":
        return {"throughput": [[rate] for rate in seen.rates]}
    if seen.load and settings.rate is None:
        return {}
    found = {"latency": [[each.latency for each in one if each.ok] for one in seen.rounds]}
    for name, value in series_of(workload, settings).items():
        series = [
            [number for each in one if each.ok and (number := value(each)) is not None]
            for one in seen.rounds
        ]
        if any(series):
            found[name] = series
    return found


def phases(observed: Iterable[Observation]) -> dict[str, Any]:
    """What the server says of each request, and what is left for its client and the way."""
    answered = [each for each in observed if each.ok]
    found = {}
    for name in PHASES:
        values = [getattr(each.timings, name) for each in answered]
        if any(values):
            found[name] = _summary(values)
    if answered:
        found["client"] = _summary([each.client for each in answered])
    return found


def encoding(asker: Asker) -> dict[str, Any]:
    """What it takes to make a file of a frame, measured by itself: part of `client` in process."""
    kind = asker.workload.output_format
    if kind == "raw":
        return {}
    draw = np.random.default_rng(0)
    small = draw.integers(0, 255, (asker.info.height // 8, asker.info.width // 8, 3), np.uint8)
    picture = small.repeat(8, 0).repeat(8, 1)
    frames = asker.workload.frame_count(asker.info)
    taken = []
    for _ in range(ENCODINGS):
        began = time.perf_counter()
        media.encode_picture(picture, kind)
        taken.append(frames * (time.perf_counter() - began))
    return {"media_encoding": _summary(taken)}


def steps(recorded: list[tuple[int, float]], card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Decode steps by their number of rows."""
    floors = {each["rows"]: each["seconds"] for each in card.get("floor_by_rows", ())}
    by_rows: dict[int, list[float]] = {}
    for rows, seconds in recorded:
        by_rows.setdefault(rows, []).append(seconds)
    found = []
    for rows, values in sorted(by_rows.items()):
        high = statistics.summary(values).quantiles[0.99]
        found.append(
            {
                "rows": rows,
                "count": len(values),
                "median": statistics.quantile(values, 0.5),
                "p99": high.value,
                "floor": floors.get(rows),
            }
        )
    return found


def timeline(observed: list[Observation]) -> list[dict[str, Any]]:
    """The first requests, in seconds from the first; phases as one after the other."""
    found: list[dict[str, Any]] = []
    zero = min((each.scheduled for each in observed), default=0.0)
    for each in sorted(observed, key=lambda one: one.scheduled)[:SHOWN]:
        times, at = each.timings, each.sent - zero
        spans = {}
        if each.sent - each.scheduled > 1e-3:
            spans["late"] = [each.scheduled - zero, at]
        end = at + times.total
        for name in ("queue", "encode", "decode"):
            if length := getattr(times, name):
                spans[name] = [at, min(at + length, end)]
                at = min(at + length, end)
        if times.pixels and at < end:
            spans["pixels"] = [at, end]
        spans["client"] = [end, each.ended - zero]
        found.append(
            {
                "start": each.scheduled - zero,
                "end": each.ended - zero,
                "status": each.status,
                "phases": spans,
            }
        )
    return found


def _summary(values: list[float], unit: str = "s", better: str = "lower") -> dict[str, Any]:
    return {"unit": unit, "better": better, **statistics.summary(values).to_json()}
