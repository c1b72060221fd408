"""A whole measurement: card, warm-up, scenario, and the result that schema.py describes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nuwa.spec.known import known_cells
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .. import media
from ..bundle import open_bundle
from ..convert import DEFAULT_FRAMES_PER_SECOND
from . import card as cards
from . import loadgen, machine, rates, scenarios, search, statistics
from .asking import Asker
from .observation import OK, Observation
from .scenarios import Extent, Rounds
from .schema import SCHEMA
from .targets import Target
from .workload import GIVEN_FRAMES, Workload

SCENARIOS = ("single-stream", "multi-stream", "server", "offline")
EARLY = {"single-stream": 0.9, "multi-stream": 0.99}  # MLPerf's quantile of each
PHASES = ("queue", "encode", "decode", "pixels", "ranking")
WARM_UP_SECONDS = 60.0
WARM_UP_WINDOW = 4  # requests
WARM_UP_TOLERANCE = 0.1
SHOWN = 50  # requests of the timeline
ENCODINGS = 20  # of a frame, for what its file takes
BUSY = 0.3  # load average for each core from which a note says so
GUESS_SECONDS = 10.0  # of the offline run that a search for the highest rate begins with


@dataclass(frozen=True)
class Settings:
    """How a workload is asked for. streams: requests of a multi-stream query; outstanding: of the
    offline scenario, by default two for each slot; rate: of the server scenario, None for the
    highest that keeps the bound; bound: seconds within which `share` of its latencies must be;
    warm_up: requests at the most; rates: whether the machine is measured for the floor; loadgen: a
    folder for LoadGen's logs, which then drives; evaluation: a report of `nuwa evaluate`, or a
    folder of them.
    """

    scenario: str = "single-stream"
    extent: Extent = field(default_factory=lambda: Extent(60.0))
    streams: int = 8
    outstanding: int | None = None
    rate: float | None = None
    bound: float | None = None
    share: float = 0.99
    warm_up: int = 40
    rates: bool = True
    loadgen: Path | None = None
    evaluation: Path | None = None

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario {self.scenario!r} is not one of {', '.join(SCENARIOS)}")
        if self.scenario == "server" and self.bound is None:
            raise ValueError("the server scenario needs a bound of the latency (--bound)")
        if self.scenario == "server" and self.loadgen is not None and self.rate is None:
            raise ValueError("LoadGen does not search: its server scenario needs --rate")

    @property
    def at_once(self) -> int:
        """Requests that the scenario has under way, for warm-up."""
        if self.scenario == "multi-stream":
            return self.streams
        return 1 if self.scenario == "single-stream" else self.outstanding or 1


@dataclass(frozen=True)
class Seen:
    """What a scenario gave. rate, rates: answers a second, in all and by round, where the scenario
    is about that; load: of the rates that were tried.
    """

    rounds: Rounds
    seconds: float
    rate: float | None = None
    rates: list[float] = field(default_factory=list)
    load: list[dict[str, Any]] = field(default_factory=list)
    loadgen: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Observation]:
        return [each for one in self.rounds for each in one]


def measure(
    target: Target,
    workload: Workload,
    settings: Settings,
    *,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The result; what is wrong with the request is raised as it is, before anything is measured.

    say: hears what is being done.
    """
    began, described = datetime.now(UTC), machine.describe()
    settings = replace(settings, outstanding=settings.outstanding or 2 * (target.slots or 4))
    asker = Asker(target.client, workload, target.info, target.model)
    cold = time.perf_counter()
    asker.check()
    cold = time.perf_counter() - cold
    say("the machine's rates")
    card = describe_card(target, workload, settings)
    say("warm-up")
    warm_up = {"first_seconds": cold} | warmed(asker, settings.warm_up, settings.at_once)
    target.steps.clear()
    machine.forget_peak()
    say(settings.scenario)
    sampler = machine.Sampler()
    sampler.start()
    try:
        seen = run(asker, target, settings, warm_up["requests"])
    finally:
        power = sampler.stop()
    observed = seen.all
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "when": began.isoformat(timespec="seconds"),
        "command": command,
        "notes": [*seen.notes, *notes(target, described, warm_up, power, observed)],
        "machine": described,
        "model": describe_model(target, settings),
        "workload": describe_workload(target, workload),
        "scenario": describe_scenario(settings),
        "card": card,
        "warm_up": warm_up,
        "outcomes": dict(Counter(each.status for each in observed)),
        "metrics": metrics(seen, workload, settings, card.get("floor_seconds")),
        "phases": phases(observed) | encoding(asker),
        "steps": steps(target.steps, card),
        "load": seen.load,
        "timeline": {"requests": timeline(observed)},
        "memory": memory(target, power),
        "power": power if target.local else None,
        "rounds": in_rounds(seen, workload, settings),
    }
    if seen.loadgen is not None:
        result["loadgen"] = seen.loadgen
    return result


def warmed(asker: Asker, most: int, at_once: int = 1) -> dict[str, Any]:
    """Requests one after another until they take as long as those to come, `most` of them or for
    WARM_UP_SECONDS; then, where the scenario has several at a time, `at_once` of them together.
    """
    began, first, requests = time.perf_counter(), None, 0
    latencies: list[float] = []
    while requests < most and time.perf_counter() - began < WARM_UP_SECONDS:
        seen = asker(requests, time.perf_counter())
        requests += 1
        if not seen.ok:
            continue
        latencies.append(seen.latency)
        first = statistics.steady(latencies, WARM_UP_WINDOW, WARM_UP_TOLERANCE)
        if first is not None:
            break
    if at_once > 1:
        extent = Extent(0.0, rounds=1, least=1, most=1)
        scenarios.multi_stream(asker, extent, at_once, requests)
        requests += at_once
    return {
        "requests": requests,
        "seconds": time.perf_counter() - began,
        "steady": first is not None,
    }


def run(asker: Asker, target: Target, settings: Settings, first: int) -> Seen:
    """The scenario; queries are numbered from `first` on."""
    extent, outstanding = settings.extent, settings.outstanding
    assert outstanding is not None, "measure has set it"
    began = time.perf_counter()
    if settings.loadgen is not None:
        return _by_loadgen(asker, settings, settings.loadgen, outstanding)
    if settings.scenario == "single-stream":
        rounds = scenarios.single_stream(asker, extent, first)
    elif settings.scenario == "multi-stream":
        rounds = scenarios.multi_stream(asker, extent, settings.streams, first)
    elif settings.scenario == "offline":
        found = scenarios.offline(asker, extent, outstanding, first)
        seconds = time.perf_counter() - began
        noted = [] if found.rates else ["Too few answers for the time: throughput is of all of it."]
        return Seen(found.rounds, seconds, found.rate, found.rates, notes=noted)
    else:
        return _server(asker, target, settings, outstanding, first)
    return Seen(rounds, time.perf_counter() - began)


def _server(asker: Asker, target: Target, settings: Settings, outstanding: int, first: int) -> Seen:
    """At the given rate, or at the highest that keeps the bound."""
    runs: dict[float, tuple[Rounds, float, list[tuple[int, float]]]] = {}
    least = max(settings.extent.least, statistics.least_under(0, settings.share))

    def at(rate: float) -> search.Point:
        searching = settings.rate is None
        extent = replace(settings.extent, least=least) if searching else settings.extent
        began = time.perf_counter()
        target.steps.clear()
        rounds = scenarios.server(asker, extent, rate, seed=len(runs), first=first)
        runs[rate] = rounds, time.perf_counter() - began, list(target.steps)
        return point(rate, [each for one in rounds for each in one], settings)

    noted = []
    if settings.rate is not None:
        points: list[search.Point] = [at(settings.rate)]
        best: float | None = settings.rate
    else:
        extent = replace(settings.extent, seconds=GUESS_SECONDS, rounds=1, most=None)
        guess = scenarios.offline(asker, extent, outstanding, first).rate
        if not guess:
            raise ValueError("no request was answered, so there is no rate to search for")
        best, points = search.highest_rate(at, guess)
        if best is None:
            noted.append(f"No rate kept the bound; what follows is of {min(runs):.3g} a second.")
        elif all(each.met for each in points):
            noted.append("Every rate that was tried kept the bound; the highest may be higher.")
    shown = best if best is not None else min(runs)
    rounds, seconds, steps = runs[shown]
    target.steps[:] = steps
    load = [asdict(each) | {"best": each.rate == best} for each in points]
    return Seen(rounds, seconds, load=load, notes=noted)


def point(rate: float, observed: list[Observation], settings: Settings) -> search.Point:
    """What requests at a rate say of the bound; one that failed did not keep it."""
    assert settings.bound is not None, "checked when settings were made"
    latencies = [each.latency for each in observed if each.ok]
    under = sum(latency <= settings.bound for latency in latencies)
    verdict = statistics.latency_bound(under, len(observed) - under, settings.share)
    seconds = max(each.ended for each in observed) - observed[0].scheduled
    found = statistics.summary(latencies).quantiles if latencies else {}
    p50, p99 = (found[share].value if found else None for share in (0.5, 0.99))
    return search.Point(rate, len(latencies) / seconds, p50, p99, verdict.met, verdict.more)


def _by_loadgen(asker: Asker, settings: Settings, folder: Path, outstanding: int) -> Seen:
    extent, rate = settings.extent, settings.rate or 1.0
    if settings.scenario == "offline":  # LoadGen has to be told how many are enough
        rate = scenarios.offline(asker, Extent(GUESS_SECONDS, 1), outstanding).rate or rate
    began = time.perf_counter()
    observed, verdict = loadgen.drive(
        asker,
        settings.scenario,
        folder,
        seconds=extent.seconds,
        least=extent.least,
        most=extent.most,
        rate=rate,
        bound=settings.bound or 1.0,
        share=settings.share,
        streams=settings.streams,
        outstanding=outstanding,
    )
    seconds = time.perf_counter() - began
    size = -(-len(observed) // extent.rounds) or 1
    rounds = [observed[at : at + size] for at in range(0, len(observed), size)]
    told = {
        "valid": verdict.valid,
        "problem": verdict.problem,
        "figures": verdict.figures,
        "logs": str(folder),
    }
    noted = [f"LoadGen says that this run is not valid. {verdict.problem}".strip()]
    return Seen(rounds, seconds, loadgen=told, notes=[] if verdict.valid else noted)


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


def describe_card(target: Target, workload: Workload, settings: Settings) -> dict[str, Any]:
    """What a generation must move and compute, and how long that takes at this machine's rates.

    Empty where the bundle's folder is not known; without rates and floor where these were not
    asked for, or for what is not computed by this machine's processor.
    """
    if target.bundle is None:
        return {}
    manifest, task = open_bundle(target.bundle, verify=False).manifest, workload.task
    sampling = target.info.sampling.get(task, Sampling())
    frames = workload.frame_count(target.info)
    query = workload.query(0, target.info)
    grid, known = manifest.config.decoder.grid, None
    if task.needs_mask:
        known = known_cells(query.options["mask"], grid.height, grid.width)
    made = cards.card(
        manifest,
        task,
        frames=frames,
        samples=workload.samples,
        guidance=workload.sampling.get("guidance_scale", sampling.guidance_scale),
        schedule=workload.schedule,
        given_frames=min(GIVEN_FRAMES, frames - 1) if task is Task.V2V else 0,
        known=known,
    )
    found = made.to_json()
    if not settings.rates or not target.local or not target.info.backend.endswith("cpu"):
        return found
    quota = machine.cpu_quota(machine.Hardware())
    threads = target.threads or machine.usable_cores() or 1
    if quota is not None:
        threads = max(1, min(threads, int(quota)))
    measured = rates.measure(
        cards.products(manifest.config),
        made.row_counts,
        threads=threads,
        working_set=made.weights_bytes,
    )
    return found | cards.floor(made, measured).to_json() | {"rates": measured.to_json()}


def describe_model(target: Target, settings: Settings) -> dict[str, Any]:
    info = target.info
    evaluation, reason = None, "the bundle's folder is not known"
    if target.bundle is not None:
        by_task, told = cards.evaluation_of(target.bundle, settings.evaluation)
        reason = told or ""
        if by_task is not None:
            evaluation = {
                f"{task} {name}": score["model"]
                for task, result in by_task.items()
                for name, score in result["scores"].items()
            }
    return {
        "name": info.name,
        "bundle_hash": info.bundle_hash,
        "precision": info.precision,
        "backend": info.backend,
        "parameters": info.parameter_count,
        "evaluation": evaluation,
        "evaluation_note": reason,
    }


def describe_workload(target: Target, workload: Workload) -> dict[str, Any]:
    return {
        "task": str(workload.task),
        "frames": workload.frame_count(target.info),
        "samples": workload.samples,
        "schedule": workload.schedule,
        "sampling": asdict(target.info.sampling.get(workload.task, Sampling()))
        | dict(workload.sampling),
        "output_format": workload.output_format,
        "prompts": [workload.prompt(number) for number in range(len(workload.prompts) or 6)],
        "seed": workload.seed,
        "target": target.title,
        "slots": target.slots,
        "threads": target.threads,
    }


def describe_scenario(settings: Settings) -> dict[str, Any]:
    """Its name and what of the settings it heeds."""
    of_scenario: dict[str, dict[str, Any]] = {
        "multi-stream": {"streams": settings.streams},
        "offline": {"outstanding": settings.outstanding},
        "server": {
            "rate": settings.rate,
            "slo_seconds": settings.bound,
            "slo_quantile": f"{settings.share:g}",
        },
    }
    extent = settings.extent
    return {
        "name": settings.scenario,
        "driven_by": "LoadGen" if settings.loadgen is not None else "nuwa bench",
        "seconds": extent.seconds,
        "rounds": extent.rounds,
        "least": extent.least,
        "most": extent.most,
        **of_scenario.get(settings.scenario, {}),
    }


def memory(target: Target, power: Mapping[str, Any]) -> dict[str, Any]:
    """Of this process, with the engine if it is in it, while it was measured."""
    seen = power.get("seen") or {}
    devices = [
        each["most"] for name, each in seen.items() if name.endswith("_process_bytes") and each
    ]
    peak = machine.peak_memory()["peak_process_bytes"]
    return {
        "process_peak_bytes": peak if target.local else None,
        "device_peak_bytes": max(devices, default=None) if target.local else None,
    }


def notes(
    target: Target,
    described: Mapping[str, Any],
    warm_up: Mapping[str, Any],
    power: Mapping[str, Any],
    observed: list[Observation],
) -> list[str]:
    """What a reader has to know to believe the rest."""
    found = []
    if not target.local:
        found.append("The machine described here is the client's.")
    load, cores = described.get("load_average"), described.get("cores") or 1
    if load and load[0] > BUSY * cores:
        found.append(f"The machine was busy before: load average {load[0]:.2f} on {cores} cores.")
    if not warm_up["steady"]:
        found.append(f"After {warm_up['requests']} requests latencies were not steady yet.")
    if power.get("throttled"):
        found.append(f"Kept down meanwhile: {', '.join(power['throttled'])}.")
    failed = Counter(each.status for each in observed if each.status != OK)
    if failed:
        told = ", ".join(f"{count} {status}" for status, count in failed.most_common())
        found.append(f"Not answered, and not in the figures: {told}.")
    return found


def _summary(values: list[float], unit: str = "s", better: str = "lower") -> dict[str, Any]:
    return {"unit": unit, "better": better, **statistics.summary(values).to_json()}
