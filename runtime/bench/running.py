"""How a workload is asked for: the settings of a scenario, its warm-up, its run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import scenarios, statistics
from .asking import Asker, prepared
from .observation import Observation
from .scenarios import Extent, Interrupted, Rounds
from .targets import Target
from .turns import Turns

SCENARIOS = ("single-stream", "multi-stream", "server", "offline")
WARM_UP_SECONDS = 60.0
WARM_UP_WINDOW = 4  # requests
WARM_UP_TOLERANCE = 0.1
REFUSALS = 0.01  # share of requests from which throughput is not that of a server at work


@dataclass(frozen=True)
class Settings:
    """How a workload is asked for. streams: requests of a multi-stream query; outstanding: of the
    offline scenario, by default two for each slot; rate: of the server scenario, None for the
    highest that keeps the bound; bound: seconds within which `share` of its latencies must be;
    warm_up: requests at the most; rates: whether the machine is measured for the floor; loadgen: a
    folder for LoadGen's logs, which then drives; evaluation: a report of `nuwa evaluate`, or a
    folder of them; turns: with another run, round by round.
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
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario {self.scenario!r} is not one of {', '.join(SCENARIOS)}")
        if self.scenario == "server" and self.bound is None:
            raise ValueError("the server scenario needs a bound of the latency (--bound)")
        if self.scenario == "server" and self.loadgen is not None and self.rate is None:
            raise ValueError("LoadGen does not search: its server scenario needs --rate")
        if self.in_turns and self.loadgen is not None:
            raise ValueError("LoadGen takes no turns: --against or --loadgen")
        if self.in_turns and self.scenario == "server":
            raise ValueError(
                "the server scenario takes no turns, as its queue would be empty at each; "
                "--against is of single-stream, multi-stream and offline"
            )
        least, most = statistics.signed_rank_needed(), self.extent.most
        if self.in_turns and min(self.extent.rounds, most or least) < least:
            raise ValueError(f"turns take {least} rounds and queries of each launch at the least")

    @property
    def in_turns(self) -> bool:
        return self.turns.id is not None

    @property
    def at_once(self) -> int:
        """Requests that the scenario has under way, for warm-up."""
        if self.scenario == "multi-stream":
            return self.streams
        return 1 if self.scenario == "single-stream" else self.outstanding or 1


@dataclass(frozen=True)
class Seen:
    """What a scenario gave. rate, rates: answers a second, in all and by round, where the scenario
    is about that; beside: what ended when that did not count; load: of the rates that were tried;
    search: what a search for the highest rate found (search.Found); interrupted: by Ctrl-C, and the
    rest is what there was by then.
    """

    rounds: Rounds
    seconds: float
    rate: float | None = None
    rates: list[float] = field(default_factory=list)
    load: list[dict[str, Any]] = field(default_factory=list)
    loadgen: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    beside: list[Observation] = field(default_factory=list)
    search: dict[str, Any] | None = None
    interrupted: bool = False

    @property
    def all(self) -> list[Observation]:
        """What the figures are of."""
        return [each for one in self.rounds for each in one]

    @property
    def asked(self) -> list[Observation]:
        """What the outcomes are of: also those whose time does not count."""
        return self.all + self.beside


def warmed(asker: Asker, most: int, at_once: int = 1) -> dict[str, Any]:
    """Requests one after another until they take as long as those to come, `most` of them or for
    WARM_UP_SECONDS; then, where the scenario has several at a time, `at_once` of them together.
    """
    began, first, requests = time.perf_counter(), None, 0
    latencies: list[float] = []
    with scenarios.workers(1) as pool:
        while requests < most and time.perf_counter() - began < WARM_UP_SECONDS:
            seen = pool.submit(prepared(asker, requests), time.perf_counter()).result()
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


def run(
    asker: Asker,
    target: Target,
    settings: Settings,
    first: int,
    say: Callable[[str], None] = lambda text: None,
) -> Seen:
    """The scenario; queries are numbered from `first` on. say: hears how a search goes on.

    Ctrl-C gives what there is by then, marked so; if that is nothing, it is raised.
    """
    from . import driven, serving

    outstanding = settings.outstanding
    assert outstanding is not None, "measure has set it"
    if settings.loadgen is not None:
        seen = driven.by_loadgen(asker, settings, settings.loadgen, outstanding)
    elif settings.scenario == "server":
        seen = serving.serve(asker, target, settings, outstanding, first, say)
    elif settings.scenario == "offline":
        seen = _offline(asker, settings, outstanding, first)
    else:
        seen = _streams(asker, settings, first)
    if seen.interrupted and not seen.asked:
        raise KeyboardInterrupt
    if seen.interrupted:
        seen.notes.append("Interrupted: this is what there was by then.")
    return seen


def _streams(asker: Asker, settings: Settings, first: int) -> Seen:
    extent, turns = settings.extent, settings.turns
    began, interrupted = time.perf_counter(), False
    try:
        if settings.scenario == "multi-stream":
            rounds = scenarios.multi_stream(asker, extent, settings.streams, first, turns)
        else:
            rounds = scenarios.single_stream(asker, extent, first, turns)
    except Interrupted as ended:
        rounds, interrupted = ended.rounds, True
    seconds = time.perf_counter() - began - turns.waited
    return Seen(rounds, seconds, interrupted=interrupted)


def _offline(asker: Asker, settings: Settings, outstanding: int, first: int) -> Seen:
    extent, turns = settings.extent, settings.turns
    began, interrupted = time.perf_counter(), False
    try:
        if settings.in_turns:
            found = scenarios.offline_in_turns(asker, extent, outstanding, turns, first)
        else:
            found = scenarios.offline(asker, extent, outstanding, first)
    except Interrupted as ended:
        assert ended.throughput is not None, "offline says it"
        found, interrupted = ended.throughput, True
    seconds = time.perf_counter() - began - turns.waited
    noted = []
    if not any(found.rates):
        noted.append("Too few answers for the time: throughput is of all of it.")
    noted += refusals(found, outstanding)
    return Seen(
        found.rounds,
        seconds,
        found.rate,
        found.rates,
        notes=noted,
        beside=found.beside,
        interrupted=interrupted,
    )


def refusals(found: scenarios.Throughput, outstanding: int) -> list[str]:
    """Notes on an offline run that had more requests under way than the server takes."""
    noted = []
    if found.outstanding is not None and found.outstanding < outstanding:
        noted.append(
            f"The server refused some of {outstanding} requests at a time: there were "
            f"{found.outstanding} in the end."
        )
    counted = [each for one in found.rounds for each in one]
    refused = sum(each.status in scenarios.REFUSED for each in counted)
    if refused > REFUSALS * len(counted):
        noted.append(
            f"{refused} of {len(counted)} requests were refused in the time that counts: this "
            "throughput is not what the server can do."
        )
    return noted
