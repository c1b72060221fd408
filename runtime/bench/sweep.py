"""Many settings of one server, each measured shortly: which are worth having, and the best one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..settings import ServerSettings
from . import scenarios, statistics
from .asking import Asker
from .running import warmed
from .scenarios import Extent
from .targets import in_process
from .workload import Workload

WARM_UP = 16  # requests at the most
PREFERENCES = ("latency", "throughput", "balance")


@dataclass(frozen=True)
class Choice:
    """What one server is started with. threads: None for one a core."""

    bundle: str
    backend: str
    threads: int | None
    slots: int


@dataclass(frozen=True)
class Outcome:
    """latency: median of one request at a time, in seconds; throughput: answers a second with the
    slots full; problem: why there are none. worth: no other is better in one and as good in both.
    """

    choice: Choice
    precision: str = ""
    latency: float | None = None
    throughput: float | None = None
    problem: str = ""
    worth: bool = False


def choices(
    bundles: Iterable[str],
    backends: Iterable[str],
    threads: Iterable[int | None],
    slots: Iterable[int],
) -> Iterator[Choice]:
    """All combinations, those of a bundle and backend side by side."""
    for each in itertools.product(bundles, backends, threads, slots):
        yield Choice(*each)


def sweep(
    wanted: Sequence[Choice],
    workload: Workload,
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Measures each for `seconds`, half of them one request at a time; fastest latency first.

    What this machine cannot do is told in its outcome and is no error.
    """
    found = []
    for number, choice in enumerate(wanted, 1):
        say(f"{number} of {len(wanted)}: {told(choice)}")
        found.append(_measured(choice, workload, seconds))
    return ranked(found)


def ranked(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """With `worth`: the Pareto front of low latency and high throughput."""
    each = list(outcomes)
    marked = [replace(one, worth=_worth(one, each)) for one in each]
    return sorted(marked, key=lambda one: (one.latency is None, one.latency or 0.0))


def _worth(one: Outcome, among: Iterable[Outcome]) -> bool:
    if one.latency is None or one.throughput is None:
        return False
    for other in among:
        if other.latency is None or other.throughput is None:
            continue
        better = other.latency < one.latency or other.throughput > one.throughput
        if better and other.latency <= one.latency and other.throughput >= one.throughput:
            return False
    return True


def best(outcomes: Sequence[Outcome], prefer: str) -> Outcome:
    """Of those worth having the one with the lowest latency, the highest throughput, or the best
    product of both. ValueError if none could be measured, or for an unknown preference.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"preference {prefer!r} is not one of {', '.join(PREFERENCES)}")
    front = [one for one in outcomes if one.worth]
    if not front:
        problems = "; ".join(f"{told(one.choice)}: {one.problem}" for one in outcomes)
        raise ValueError(f"none of the settings could be measured: {problems}")
    keys: dict[str, Callable[[Outcome], float]] = {
        "latency": lambda one: one.latency or 0.0,
        "throughput": lambda one: -(one.throughput or 0.0),
        "balance": lambda one: (one.latency or 0.0) / (one.throughput or 1e-9),
    }
    return min(front, key=keys[prefer])


def to_toml(outcome: Outcome) -> str:
    """Settings that `nuwa serve --config` reads."""
    choice = outcome.choice
    fields: dict[str, Any] = {
        "bundle": Path(choice.bundle),
        "backend": choice.backend,
        "threads": choice.threads,
        "slots": choice.slots,
    }
    settings = ServerSettings(**fields)
    about = (
        f"# Found by `nuwa bench sweep`: {1000 * (outcome.latency or 0):.1f} ms a request alone, "
        f"{outcome.throughput:.3g} requests a second.\n"
    )
    return about + settings.to_toml()


def told(choice: Choice) -> str:
    threads = "one a core" if choice.threads is None else choice.threads
    return f"{choice.bundle}, {choice.backend}, threads {threads}, slots {choice.slots}"


def to_json(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [asdict(one) for one in outcomes]


def _measured(choice: Choice, workload: Workload, seconds: float) -> Outcome:
    try:
        with in_process(
            Path(choice.bundle),
            slots=choice.slots,
            threads=choice.threads,
            backend=choice.backend,
            queue_size=max(64, 4 * choice.slots),
        ) as target:
            asker = Asker(target.client, workload, target.info, target.model)
            asker.check()
            first = warmed(asker, WARM_UP)["requests"]
            alone = scenarios.single_stream(asker, Extent(seconds / 2, 1, least=6), first)
            latencies = [each.latency for each in alone[0] if each.ok]
            if not latencies:
                return Outcome(choice, problem=f"no request was answered: {alone[0][0].status}")
            crowd = scenarios.offline(
                asker, Extent(seconds / 2, 2), 2 * choice.slots, first + len(alone[0])
            )
            return Outcome(
                choice,
                target.info.precision,
                statistics.quantile(latencies, 0.5),
                crowd.rate,
            )
    except Exception as error:  # what was measured before is not lost to one bad setting
        return Outcome(choice, problem=f"{type(error).__name__}: {error}")
