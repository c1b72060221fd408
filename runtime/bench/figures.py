"""The figures of a result: metrics, phases, steps and a timeline of what was observed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import media
from ..convert import DEFAULT_FRAMES_PER_SECOND
from ..core import Pixels, Timings
from . import statistics
from .floor import of_any_rows
from .observation import Observation
from .running import Seen, Settings
from .workload import Workload

NO_PHASES = ("total", "steps")  # of what the server says of a request
# Phases that run while others do, or after them, and what is part of another (prefill of decode).
BESIDE = ("pixels", "encoding", "ranking", "prefill")
SHOWN = 50  # requests of the timeline
KEPT = 4000  # latencies of the picture
ENCODINGS = 20  # of a frame, for what its file takes
LEAST_ROUNDS = 6  # for a drift to be told

Json = dict[str, Any]


@dataclass(frozen=True)
class Surroundings:
    """What metrics are beside latencies. card: that of the result; frames, given: of an answer, and
    those of them that the client sent; energy: of the span in which the answers of `counted` came;
    sampling: the share of the time that the sampler took.
    """

    card: Mapping[str, Any] = field(default_factory=dict)
    frames: int = 1
    given: int = 0
    energy: Mapping[str, Any] | None = None
    sampling: float = 0.0


def metrics(seen: Seen, workload: Workload, settings: Settings, around: Surroundings) -> Json:
    """Of the requests that were answered. Values are in order of time, as what intervals are worth
    follows from how neighbours depend on each other.
    """
    answered = [each for each in seen.all if each.ok]
    if not answered:
        return {}
    asked = settings.scenario == "server"
    shares = statistics.shares_with(settings.share) if asked else statistics.SHARES
    latencies = [each.latency for each in answered]
    found = {"latency": _summary(latencies, shares=shares)}
    if settings.scenario in statistics.JUDGED_BY:
        share = statistics.JUDGED_BY[settings.scenario]
        stopped = statistics.early_stopping(latencies, share)
        known = {"value": stopped.value} if stopped.value else {"needs": stopped.needs}
        found[f"early_stopping_p{100 * share:g}"] = {"unit": "s", "better": "lower", **known}
    for name, value in series_of(workload, settings, around.given).items():
        values = [number for each in answered if (number := value(each)) is not None]
        if values:
            found[name] = _summary(values, *UNITS[name])
    found["throughput"] = _throughput(seen, settings, len(answered))
    best = [each["rate"] for each in seen.load if each.get("best") and each["met"]]
    if best and settings.rate is None:
        found["highest_rate"] = {"unit": "1/s", "better": "higher", "value": best[0]}
    if (spent := _energy(seen, workload, settings, around)) is not None:
        found[f"energy_per_{'frame' if workload.task.is_video else 'image'}"] = spent
    if settings.scenario == "single-stream" and settings.loadgen is None and seen.seconds:
        between = 1 - sum(each.ended - each.sent for each in seen.all) / seen.seconds
        share = max(between, 0.0) + around.sampling
        found["measuring"] = {"unit": "", "better": "lower", "value": share}
    for name, least in floors(settings, around).items():
        if name in found:
            found[name] |= _beside(found[name], least)
    return found


def _throughput(seen: Seen, settings: Settings, answered: int) -> Json:
    """As the scenario said it; where it did not, answers in the time, all of it."""
    rate = seen.rate
    if rate is None:
        rate = answered / seen.seconds if seen.seconds else 0.0
    span = statistics.mean_interval(seen.rates) if seen.rates else None
    ends = {} if span is None else {"low": max(span[0], 0.0), "high": span[1]}
    if settings.scenario == "multi-stream" and seen.rate is None:
        rate *= settings.streams
    return {"unit": "1/s", "better": "higher", "value": rate, **ends}


def floors(settings: Settings, around: Surroundings) -> dict[str, float]:
    """What metrics cannot be better than, by name: of latencies the least, of rates the most.

    Offline latency has none, as there is waiting in it by intent; the server scenario's is that of
    a request alone.
    """
    alone = around.card.get("floor_seconds")
    together = (around.card.get("floor_together") or {}).get("seconds")
    if not alone or not together:
        return {}
    if settings.scenario == "offline":
        return {"throughput": 1 / together}
    whole = alone
    if settings.scenario == "multi-stream":
        whole = max(alone, settings.streams * together)
    found = {"latency": whole}
    if settings.scenario in statistics.JUDGED_BY:
        found[f"early_stopping_p{100 * statistics.JUDGED_BY[settings.scenario]:g}"] = whole
        found["throughput"] = (
            settings.streams if settings.scenario == "multi-stream" else 1
        ) / whole
    else:
        found["highest_rate"] = 1 / together
    if first := around.card.get("floor_first_frame_seconds"):
        found["time_to_first_frame"] = first
    made = around.frames - around.given
    found["realtime_factor"] = made / DEFAULT_FRAMES_PER_SECOND / alone
    return found


def _beside(metric: Json, least: float) -> Json:
    """The floor, and the share of its speed that is reached; none of what was refused."""
    median = (metric.get("quantiles") or {}).get("0.5", {}).get("value")
    value = metric.get("value") or median or metric.get("mean")
    if not value:
        return {"floor": least}
    fraction = least / value if metric["better"] == "lower" else value / least
    return {"floor": least, "floor_fraction": fraction}


def beaten(result: Mapping[str, Any]) -> bool:
    """Whether a metric is better than it can be, or a size of step quicker."""
    fractions = [each.get("floor_fraction") or 0.0 for each in result["metrics"].values()]
    fractions += [each["floor"] / each["median"] for each in result["steps"] if each["floor"]]
    return max(fractions, default=0.0) > 1.0


UNITS = {
    "time_to_first_frame": ("s", "lower"),
    "time_per_frame": ("s", "lower"),
    "realtime_factor": ("x", "higher"),
}


def series_of(
    workload: Workload, settings: Settings, given: int = 0
) -> dict[str, Callable[[Observation], float | None]]:
    """What else a request of a clip has, by metric, of the frames that were made: the first `given`
    are not.

    Not of several at once, which are one observation; frames of ranked samples come all at the end.
    """
    if not workload.task.is_video or settings.scenario == "multi-stream":
        return {}

    def realtime(each: Observation) -> float:
        """Seconds of video a second, where a clip is shown at the rate that files have."""
        return max(len(each.frames) - given, 0) / DEFAULT_FRAMES_PER_SECOND / each.latency

    found: dict[str, Callable[[Observation], float | None]] = {
        "time_to_first_frame": lambda each: each.time_to_first_frame(given)
    }
    if workload.rank_by is None:
        found["time_per_frame"] = lambda each: each.time_per_frame(given)
    return found | {"realtime_factor": realtime}


def in_rounds(
    seen: Seen, workload: Workload, settings: Settings, given: int = 0
) -> dict[str, list[list[float]]]:
    """Values by metric and round, for comparisons.

    Offline it is throughput that is compared, and of a search the rate that was found: latencies
    there depend on how many wait, and on the rate.
    """
    if settings.scenario == "offline":
        return {"throughput": [[rate] if rate else [] for rate in seen.rates]}
    if settings.scenario == "server" and settings.rate is None:
        return {}
    found = {"latency": [[each.latency for each in one if each.ok] for one in seen.rounds]}
    for name, value in series_of(workload, settings, given).items():
        series = [
            [number for each in one if each.ok and (number := value(each)) is not None]
            for one in seen.rounds
        ]
        if any(series):
            found[name] = series
    return found


def latencies(observed: Iterable[Observation]) -> Json:
    """Of every scenario, for its picture; of more than KEPT those that are evenly apart by rank."""
    ordered = np.sort([each.latency for each in observed if each.ok])
    picked = np.linspace(0, len(ordered) - 1, min(len(ordered), KEPT)).round().astype(int)
    return {"count": len(ordered), "values": ordered[picked].tolist()}


def counted(seen: Seen, settings: Settings) -> tuple[float, float, int] | None:
    """(from, to, how many) of the answers that are counted, by time.perf_counter: those that came
    within the time, and nobody else's work. None also where another run took turns meanwhile.

    Where there are always some under way, from one answer to the last: the first is of before.
    """
    if settings.in_turns:
        return None
    ended = sorted(each.ended for each in seen.all if each.ok)
    if settings.scenario == "offline" and len(ended) > 1:
        return ended[0], ended[-1], sum(moment > ended[0] for moment in ended)
    if not ended:
        return None
    return min(each.sent for each in seen.all), ended[-1], len(ended)


def _energy(
    seen: Seen, workload: Workload, settings: Settings, around: Surroundings
) -> Json | None:
    span = counted(seen, settings)
    if around.energy is None or span is None or span[1] <= span[0]:
        return None
    start, end, answers = span
    streams = settings.streams if settings.scenario == "multi-stream" else 1
    made = answers * streams * (around.frames - around.given)
    told = {name: around.energy[name] for name in ("of", "idle_watts") if name in around.energy}
    joules = around.energy["joules"]
    return {
        "unit": "J",
        "better": "lower",
        "value": joules / made,
        "joules": joules,
        "watts": joules / (end - start),
        "made": made,
    } | told


def drift(seen: Seen, settings: Settings) -> Json:
    """By which share the last third of the rounds was slower than the first; clear: every one of
    the last was slower than every one of the first, or every one quicker. Empty for few rounds.
    """
    pace = [1 / rate for rate in seen.rates if rate]
    if settings.scenario != "offline" or not pace:
        ok = ([each.latency for each in one if each.ok] for one in seen.rounds)
        pace = [float(np.median(values)) for values in ok if values]
    if len(pace) < LEAST_ROUNDS:
        return {}
    first, last = pace[: len(pace) // 3], pace[-(len(pace) // 3) :]
    slower = float(np.median(last) / np.median(first)) - 1
    return {"slower": slower, "clear": min(last) > max(first) or max(last) < min(first)}


def phase_names() -> list[str]:
    """All that the server's timings have."""
    return [each.name for each in dataclasses.fields(Timings) if each.name not in NO_PHASES]


def phases(observed: Iterable[Observation]) -> Json:
    """What the server says of each request, and what is left for its client and the way."""
    answered = [each for each in observed if each.ok]
    found = {}
    for name in phase_names():
        values = [getattr(each.timings, name) for each in answered]
        if any(values):
            found[name] = _summary(values)
    if answered:
        found["client"] = _summary([each.client for each in answered])
    return found


def encoding(kind: str, pictures: Pixels) -> Json:
    """What it takes here to make files of an answer's pictures, measured by itself: part of
    `client` where client and engine are one process. Empty for what is sent raw.

    pictures: u8 [F, H, W, 3] or [H, W, 3], as they were generated.
    """
    if kind == "raw":
        return {}
    frames = pictures if pictures.ndim == 4 else pictures[None]
    taken = []
    for repeat in range(ENCODINGS):
        began = time.perf_counter()
        media.encode_picture(frames[repeat % len(frames)], kind)
        taken.append(len(frames) * (time.perf_counter() - began))
    return {"media_encoding": _summary(taken)}


def steps(
    recorded: list[tuple[int, float]], card: Mapping[str, Any], alone: bool = True
) -> list[Json]:
    """Decode steps by their number of rows; alone: each is of one generation."""
    floors = {each["rows"]: each["seconds"] for each in card.get("floor_by_rows") or () if alone}
    of_any = of_any_rows(card.get("floor_of_any_rows"))
    by_rows: dict[int, list[float]] = {}
    for rows, seconds in recorded:
        by_rows.setdefault(rows, []).append(seconds)
    found = []
    for rows, values in sorted(by_rows.items()):
        least = floors.get(rows)
        if least is None and of_any is not None:
            least = of_any.seconds(rows)
        found.append(
            {
                "rows": rows,
                "count": len(values),
                "median": statistics.quantile(values, 0.5),
                "p99": statistics.supported(values, 0.99),
                "floor": least,
            }
        )
    return found


def timeline(observed: list[Observation]) -> list[Json]:
    """The first requests, in seconds from the first; phases as one after the other."""
    found: list[Json] = []
    names = [name for name in phase_names() if name not in BESIDE]
    zero = min((each.scheduled for each in observed), default=0.0)
    for each in sorted(observed, key=lambda one: one.scheduled)[:SHOWN]:
        times, at = each.timings, each.sent - zero
        spans = {}
        if each.sent - each.scheduled > 1e-3:
            spans["late"] = [each.scheduled - zero, at]
        end = at + times.total
        for name in names:
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


def _summary(
    values: list[float],
    unit: str = "s",
    better: str = "lower",
    shares: Sequence[float] = statistics.SHARES,
) -> Json:
    found = statistics.summary(values, shares).to_json()
    return {"unit": unit, "better": better, **found}
