"""Two results of one scenario side by side: what is slower, what is faster, what cannot be told.

A machine drifts: what it does in one minute differs from the next one's by more than the values
within a minute say. So a round counts as one observation, the logarithm of its median, and Welch's
t-test compares those of the two results. Knows how results are laid out in JSON, and not how they
were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .statistics import student_t

if TYPE_CHECKING:
    from rich.console import Console

Verdict = Literal["slower", "faster", "no difference", "unknown"]
Better = Literal["lower", "higher"]
Rounds = Sequence[Sequence[float | None]]

STYLES = {"slower": "red", "faster": "green", "no difference": "", "unknown": "yellow"}
LEAST_ROUNDS = 2
SINGLE = ("highest_rate",)  # metrics that are one number
SAME = ("scenario", "workload", "task")  # parts of a result that must be
LISTED = ("version", "model", "machine")  # parts that may differ
# Names within SAME that may differ, too: how long it was measured, and what served it.
FREE = ("seconds", "rounds", "least", "most", "target", "slots", "threads")


@dataclass(frozen=True)
class Difference:
    """Of one metric. a, b: the values of the results in `unit`, each the geometric mean of its
    rounds' medians; ratio: b / a, with its interval low, high. Where the verdict is "unknown",
    these five are None, and reason says why.
    """

    name: str
    unit: str
    better: Better
    verdict: Verdict
    a: float | None = None
    b: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


def compare(
    a: Rounds,
    b: Rounds,
    threshold: float = 0.05,
    confidence: float = 0.95,
    *,
    better: Better = "lower",
    name: str = "",
    unit: str = "s",
) -> Difference:
    """The verdict on one metric: the values of each round of both results.

    A difference is told if the ratio's interval excludes 1 and the ratio is beyond the threshold:
    above 1 + threshold, or below 1 / (1 + threshold). "no difference" means that none was found;
    how large a one may have gone unseen is what the interval says. Rounds are taken for independent
    of each other, and the two results for measured one after the other, not round by round. Only
    what moves medians is seen: a longer tail is not. None and rounds without values are passed
    over. "unknown" with fewer than LEAST_ROUNDS rounds, or where a median is 0.
    """
    if not threshold >= 0:
        raise ValueError(f"a threshold of {threshold}: at least 0")
    if better not in ("lower", "higher"):
        raise ValueError(f"better {better!r}: lower or higher")
    first, second = _medians(a), _medians(b)
    rounds = min(len(first), len(second))
    if rounds < LEAST_ROUNDS:
        reason = f"{rounds} of at least {LEAST_ROUNDS} rounds"
        return Difference(name, unit, better, "unknown", reason=reason)
    if min(first.min(), second.min()) <= 0:
        return Difference(name, unit, better, "unknown", reason="a median is not above 0")
    logs = np.log(first), np.log(second)
    middle, half = _welch(*logs, confidence)
    apart = abs(middle) > half and abs(middle) > math.log1p(threshold)
    worse = (middle > 0) == (better == "lower")
    verdict: Verdict = "no difference" if not apart else "slower" if worse else "faster"
    return Difference(
        name,
        unit,
        better,
        verdict,
        a=math.exp(float(logs[0].mean())),
        b=math.exp(float(logs[1].mean())),
        ratio=math.exp(middle),
        low=math.exp(middle - half),
        high=math.exp(middle + half),
    )


def compare_results(
    a: Mapping[str, Any], b: Mapping[str, Any], threshold: float = 0.05, confidence: float = 0.95
) -> list[Difference]:
    """Every metric with rounds in both results, in the order of the first; then what is one number
    in both, by the threshold alone, and how many requests failed.

    ValueError that names what differs if they are not of the same workload, scenario and task, or
    have no metric in common.
    """
    unlike = [line for part in SAME for line in _unlike(a.get(part), b.get(part), part, FREE)]
    names = [name for name in _rounds(a) if name in _rounds(b)]
    for name in names:
        of_a, of_b = (result["metrics"][name] for result in (a, b))
        for key in ("unit", "better"):
            unlike += _unlike(of_a.get(key), of_b.get(key), f"metrics.{name}.{key}")
    if unlike:
        raise ValueError(f"results that cannot be compared differ in {'; '.join(unlike)}")
    numbers = [name for name in SINGLE if all(_value(each, name) is not None for each in (a, b))]
    if not names and not numbers:
        raise ValueError("results that cannot be compared: no metric has rounds in both")
    found = [
        compare(
            _rounds(a)[name],
            _rounds(b)[name],
            threshold,
            confidence,
            better=a["metrics"][name].get("better", "lower"),
            name=name,
            unit=a["metrics"][name].get("unit", ""),
        )
        for name in names
    ]
    found += [_by_threshold(name, a, b, threshold) for name in numbers]
    told = a.get("outcomes") and b.get("outcomes")
    return [*found, _failures(a, b, threshold)] if told else found


def _by_threshold(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], threshold: float
) -> Difference:
    """Of a metric that is one number, found once: without an interval."""
    first, second = float(_value(a, name) or 0.0), float(_value(b, name) or 0.0)
    better: Better = a["metrics"][name].get("better", "lower")
    unit = a["metrics"][name].get("unit", "")
    ratio = second / first if first else math.inf
    apart = not 1 / (1 + threshold) <= ratio <= 1 + threshold
    worse = (ratio > 1) == (better == "lower")
    verdict: Verdict = "no difference" if not apart else "slower" if worse else "faster"
    reason = "by the threshold alone"
    return Difference(name, unit, better, verdict, first, second, ratio, reason=reason)


def _failures(a: Mapping[str, Any], b: Mapping[str, Any], threshold: float) -> Difference:
    """The share of requests that were not answered; "slower" if it grew beyond the threshold."""
    first, second = _failed(a), _failed(b)
    grown = second - first
    verdict: Verdict = (
        "slower" if grown > threshold else "faster" if -grown > threshold else "no difference"
    )
    return Difference("not answered", "", "lower", verdict, first, second)


def _failed(result: Mapping[str, Any]) -> float:
    outcomes = result.get("outcomes") or {}
    total = sum(outcomes.values())
    return 1 - outcomes.get("ok", 0) / total if total else 0.0


def _value(result: Mapping[str, Any], name: str) -> float | None:
    metric = (result.get("metrics") or {}).get(name) or {}
    value: float | None = metric.get("value")
    return value


def differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What may differ between results that are compared, and does: "machine.cpu: x, y"."""
    lines = [line for part in LISTED for line in _unlike(a.get(part), b.get(part), part)]
    for part in SAME:
        of_a, of_b = (result.get(part) for result in (a, b))
        if isinstance(of_a, Mapping) and isinstance(of_b, Mapping):
            for key in FREE:
                lines += _unlike(of_a.get(key), of_b.get(key), f"{part}.{key}")
    alone = sorted(_rounds(a).keys() ^ _rounds(b).keys())
    return lines + [f"metrics.{name}: in one of them only" for name in alone]


def print_differences(
    differences: Sequence[Difference],
    differing: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """A table, and below it what else differs: lines as of `differs`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .schema import quantity

    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("metric", "a", "b", "b / a", "interval", "verdict"):
        table.add_column(head, justify="left" if head in ("metric", "verdict") else "right")
    for each in differences:
        verdict = f"{each.verdict}: {each.reason}" if each.reason else each.verdict
        values = (quantity(value, each.unit) for value in (each.a, each.b))
        cells = (each.name, *values, _number(each.ratio), _interval(each), verdict)
        table.add_row(*map(Text, cells), style=STYLES[each.verdict])
    console.print(table)
    for line in differing:
        console.print(Text(f"differs: {line}"), soft_wrap=True)


def baseline_exit(differences: Sequence[Difference]) -> int:
    """The exit status of a comparison with a baseline: 1 if anything is slower than there, or if
    nothing could be told.
    """
    verdicts = [each.verdict for each in differences if each.name != "not answered"]
    slower = any(each.verdict == "slower" for each in differences)
    return int(slower or all(verdict == "unknown" for verdict in verdicts))


def _medians(rounds: Rounds) -> np.ndarray:
    known = ([value for value in each if value is not None] for each in rounds)
    return np.array([np.median(values) for values in known if values])


def _welch(a: np.ndarray, b: np.ndarray, confidence: float) -> tuple[float, float]:
    """mean(b) - mean(a), and half the width of its interval."""
    difference = float(b.mean() - a.mean())
    of_a, of_b = (float(each.var(ddof=1)) / len(each) for each in (a, b))
    squared = of_a + of_b
    if not squared:
        return difference, 0.0
    share_a, share_b = of_a / squared, of_b / squared
    freedom = 1 / (share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1))
    return difference, student_t(confidence, freedom) * math.sqrt(squared)


def _rounds(result: Mapping[str, Any]) -> dict[str, Rounds]:
    """Those of the metrics that the result has."""
    metrics, rounds = result.get("metrics") or {}, result.get("rounds") or {}
    return {name: each for name, each in rounds.items() if metrics.get(name) and each}


def _unlike(a: Any, b: Any, where: str, free: Sequence[str] = ()) -> Iterator[str]:
    """Where two JSON values differ, and how; names in `free` do not count, and objects are gone
    through.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            if key not in free:
                yield from _unlike(a.get(key), b.get(key), f"{where}.{key}", free)
    elif a != b:
        yield f"{where}: {_plain(a)}, {_plain(b)}"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _interval(each: Difference) -> str:
    return "" if each.low is None else f"{_number(each.low)} .. {_number(each.high)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
