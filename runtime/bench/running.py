"""How a workload is asked for: the settings of a scenario, its warm-up, its run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import loadgen, scenarios, search, statistics
from .asking import Asker
from .observation import Observation
from .scenarios import Extent, Rounds
from .targets import Target

SCENARIOS = ("single-stream", "multi-stream", "server", "offline")
WARM_UP_SECONDS = 60.0
WARM_UP_WINDOW = 4  # requests
WARM_UP_TOLERANCE = 0.1
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
