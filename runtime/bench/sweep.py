"""Many settings of one server, each measured shortly: which are worth having, and the best one."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nuwa.spec.engines import RUNTIMES

from ..settings import ServerSettings
from . import scenarios, statistics
from .asking import Asker
from .describe import describe_model
from .observation import Observation
from .running import Settings, warmed
from .scenarios import Extent
from .targets import in_process
from .workload import Workload

SCHEMA = "nuwa-bench-sweep/1"
WARM_UP = 16  # requests at the most
ROUNDS = 6  # of the time with the slots full, for the interval of throughput
LEAST = 6  # requests one at a time, from which their median has an interval
PREFERENCES = ("latency", "throughput", "balance")
INTERRUPTED = "interrupted"  # the problem of what Ctrl-C left out

Span = tuple[float, float]


@dataclass(frozen=True)
class Choice:
    """What one server is started with. threads: None for one a core; buckets: upper ends of the
    ranges of rows that a step's TensorRT engines are built for, None for those that are there, and
    for backends that take steps of any size.
    """

    bundle: str
    backend: str
    threads: int | None
    slots: int
    buckets: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """latency: median of one request at a time, in seconds, of so many requests; throughput:
    answers a second with the slots full; low, high: of their 95 % intervals, None where there were
    too few, or latencies depended too much on each other; outcomes: requests by how they ended;
    model: as in a result, the bundle's hashes and scores among it; folder: of the bundle, absolute;
    problem: why there is nothing. worth: no other is surely better in one, and in the other not
    surely worse.
    """

    choice: Choice
    precision: str = ""
    latency: float | None = None
    throughput: float | None = None
    problem: str = ""
    worth: bool = False
    latency_low: float | None = None
    latency_high: float | None = None
    requests: int = 0
    throughput_low: float | None = None
    throughput_high: float | None = None
    answers: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""


def choices(
    bundles: Iterable[str],
    backends: Iterable[str],
    threads: Iterable[int | None],
    slots: Iterable[int],
    buckets: Sequence[tuple[int, ...]] = (),
) -> Iterator[Choice]:
    """All combinations, those of a bundle and backend side by side; buckets only of backends whose
    engines are built for them.
    """
    for bundle, backend, count, size in itertools.product(bundles, backends, threads, slots):
        for ranges in (buckets if backend in RUNTIMES else None) or (None,):
            yield Choice(bundle, backend, count, size, ranges)


def sweep(
    wanted: Sequence[Choice],
    workload: Workload,
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
    scores: Path | None = None,
    folder: Callable[[Choice], Path] = lambda choice: Path(choice.bundle),
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Measures each for `seconds`, half of them one request at a time; fastest latency first.

    What this machine cannot do is told in its outcome and is no error; nor is Ctrl-C, after which
    the rest are INTERRUPTED. scores: as of Settings.evaluation; folder: of a choice's bundle, made
    if need be; keep: hears after each choice what would be the result if it were the last one.
    """
    found: list[Outcome] = []

    def until_now() -> list[Outcome]:
        left = wanted[len(found) :]
        return ranked([*found, *(Outcome(choice, problem=INTERRUPTED) for choice in left)])

    with contextlib.suppress(KeyboardInterrupt):
        for number, choice in enumerate(wanted, 1):
            say(f"{number} of {len(wanted)}: {told(choice)}")
            found.append(_measured(choice, workload, seconds, scores, folder))
            keep(until_now())
    return until_now()


def ranked(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """With `worth`: the Pareto front of low latency and high throughput."""
    each = list(outcomes)
    marked = [replace(one, worth=_worth(one, each)) for one in each]
    return sorted(marked, key=lambda one: (one.latency is None, one.latency or 0.0))


def _worth(one: Outcome, among: Iterable[Outcome]) -> bool:
    """Noise does not decide it: intervals that overlap are as good as each other."""
    if one.latency is None or one.throughput is None:
        return False
    waits, rate = _latency(one), _throughput(one)
    for other in among:
        if other.latency is None or other.throughput is None:
            continue
        sooner, later = _apart(_latency(other), waits)
        fewer, more = _apart(_throughput(other), rate)
        if (sooner and not fewer) or (more and not later):
            return False
    return True


def _apart(a: Span, b: Span) -> tuple[bool, bool]:
    """Whether a is surely below b, and surely above."""
    return a[1] < b[0], a[0] > b[1]


def _latency(one: Outcome) -> Span:
    """Its interval; where there is none, anything: nothing is surely sooner or later then."""
    if one.latency_low is None or one.latency_high is None:
        return 0.0, math.inf
    return one.latency_low, one.latency_high


def _throughput(one: Outcome) -> Span:
    if one.throughput_low is None or one.throughput_high is None:
        return (one.throughput or 0.0,) * 2
    return one.throughput_low, one.throughput_high


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
    """Settings that `nuwa serve --config` reads, wherever it is started."""
    choice = outcome.choice
    fields: dict[str, Any] = {
        "bundle": Path(outcome.folder or choice.bundle).resolve(),
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
    ranges = "" if choice.buckets is None else f", buckets {' '.join(map(str, choice.buckets))}"
    return f"{choice.bundle}, {choice.backend}, threads {threads}, slots {choice.slots}{ranges}"


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader has to know to believe the rest."""
    found = []
    left_out = sum(one.problem == INTERRUPTED for one in outcomes)
    if left_out:
        found.append(f"Interrupted: {left_out} of {len(outcomes)} settings were not measured.")
    made = {one.model.get("contents_hash") or one.model.get("bundle_hash"): one for one in outcomes}
    bundles = [one for one in made.values() if one.model]
    unknown = [one.choice.bundle for one in bundles if not one.model.get("evaluation")]
    if len(bundles) > 1 and unknown:
        found.append(
            f"No scores are known of {', '.join(unknown)}: what is faster may make worse pictures."
        )
    elif len(bundles) > 1:
        found.append("The bundles differ: what is faster may make worse pictures, as scores say.")
    failed: Counter[str] = Counter()
    for one in outcomes:
        failed.update({status: count for status, count in one.outcomes.items() if status != "ok"})
    if failed:
        said = ", ".join(f"{count} {status}" for status, count in failed.most_common())
        found.append(f"Not answered, and not in the figures: {said}.")
    return found


def to_json(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    return [asdict(one) for one in outcomes]


def _measured(
    choice: Choice,
    workload: Workload,
    seconds: float,
    scores: Path | None,
    folder: Callable[[Choice], Path],
) -> Outcome:
    try:
        bundle = folder(choice)
        with in_process(
            bundle,
            slots=choice.slots,
            threads=choice.threads,
            backend=choice.backend,
            queue_size=max(64, 4 * choice.slots),
        ) as target:
            asker = Asker(target.client, workload, target.info, target.model)
            asker.check()
            known = Outcome(
                choice,
                target.info.precision,
                model=describe_model(target, Settings(evaluation=scores)),
                folder=str(bundle.resolve()),
            )
            return _figures(known, asker, seconds)
    except Exception as error:  # what was measured before is not lost to one bad setting
        return Outcome(choice, problem=f"{type(error).__name__}: {error}")


def _figures(known: Outcome, asker: Asker, seconds: float) -> Outcome:
    first = warmed(asker, WARM_UP)["requests"]
    (alone,) = scenarios.single_stream(asker, Extent(seconds / 2, 1, least=LEAST), first)
    latencies = [each.latency for each in alone if each.ok]
    if not latencies:
        status = alone[0].status if alone else INTERRUPTED
        return replace(known, problem=f"no request was answered: {status}")
    outstanding = 2 * known.choice.slots
    crowd = scenarios.offline(asker, Extent(seconds / 2, ROUNDS), outstanding, first + len(alone))
    median = statistics.summary(latencies, (0.5,)).quantiles[0.5]  # in order of time
    rate = (statistics.mean_interval(crowd.rates) if crowd.rates else None) or (None, None)
    seen: list[Observation] = [*alone, *(each for one in crowd.rounds for each in one)]
    return replace(
        known,
        latency=statistics.quantile(latencies, 0.5),
        latency_low=median.low,
        latency_high=median.high,
        requests=len(latencies),
        throughput=crowd.rate,
        throughput_low=None if rate[0] is None else max(rate[0], 0.0),
        throughput_high=rate[1],
        answers=sum(each.ok for one in crowd.rounds for each in one),
        outcomes=dict(Counter(each.status for each in seen)),
    )
