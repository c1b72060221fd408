"""Two results of one scenario side by side: what is slower, what is faster, what cannot be told.

A machine drifts: what it does in one minute differs from the next one's by more than the values
within a minute say. So a round counts as one observation, the logarithm of its median. Rounds of
two runs that took turns (turns.py) are pairs, and what is compared is how far apart those of each
pair are, by Wilcoxon's signed-rank test, as a machine's bad moments are far off. Of runs that did
not, Welch's t-test compares all of the one with all of the other.

Medians do not show a longer tail, nor a bound that is missed: so what MLPerf has a scenario judged
by is compared, too, its quantile of latency and whether the bound was kept.

Processes of one build differ, too, each in all of its rounds (launches.py). Of results of several
launches each a launch is one observation. One launch does not show how far another would be from
it: its interval is made wider by what launches were seen to differ by, and the verdict says so.
Knows how results are laid out in JSON, and not how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .judged import Rounds, is_search, loads, own_quantile, rate_kept, tails, with_quantile
from .schema import percentile
from .search import VERDICTS
from .statistics import needed, signed_rank_interval, signed_rank_needed, student_t

if TYPE_CHECKING:
    from rich.console import Console

Verdict = Literal["slower", "faster", "no difference", "unknown"]
Better = Literal["lower", "higher"]

HEADS = ("metric", "a", "b", "b / a", "interval", "launches", "verdict")
STYLES = {"slower": "red", "faster": "green", "no difference": "", "unknown": "yellow"}
LEAST_ROUNDS = 2
LEAST_LAUNCHES = 2  # of a result, from which they say how far launches are apart
# The standard deviation of the logarithm of a launch's median, where only one is known. Source:
# benchmarks/results/compare-runs-t2i-launches-2026-11-22.json, 240 pairs of launches on two cores
# of an EPYC: logarithms of their ratios have a deviation of 4.1 % once what depends on which of
# both was started first is left out, so 2.9 % a launch; some 1.5 % of it is of the rounds within.
LAUNCHES_APART = 0.025
MOST_FREEDOM = 1e4  # with which Student's t is the normal one
SCHEMA = "nuwa-bench-compare/1"
RATE = "highest_rate"  # what a search is about
WHOLE = "throughput"  # compared as one number where no metric has rounds
NOT_ANSWERED = "not answered"  # the row of how many requests failed
KEPT = "bound kept"  # the row of whether a given rate kept its bound
LATENCY = "latency"
# Tails of one build differ more than its medians, and one more row is one more chance to be wrong.
TAIL_THRESHOLDS, TAIL_CONFIDENCE = 2.0, 0.99
SAME = ("scenario", "workload", "task")  # parts of a result that must be
LISTED = ("version", "model", "machine")  # parts that may differ
# Names within SAME that may differ, too: how long it was measured, and what served it.
FREE = ("seconds", "rounds", "least", "most", "target", "slots", "threads")
IMPLIED = ("given_frames",)  # by others of SAME, and not in every result
PASSING = ("date", "load_average", "evaluation_note")  # names within LISTED that say nothing
OUTSTANDING_A_SLOT, SLOTS_UNKNOWN = 2, 4  # of the offline scenario, where it was not said


@dataclass(frozen=True)
class Difference:
    """Of one metric. a, b: the values of the results in `unit`, each the geometric mean of its
    rounds' medians; ratio: b / a, of pairs what their ratios lie around, with its interval low,
    high. What is not known of these five is
    None; reason says why a verdict is "unknown", or rests on less than rounds. launches: of several
    (launches.py) each one's ratio.
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
    launches: tuple[float, ...] = ()


def compare(
    a: Rounds,
    b: Rounds,
    threshold: float = 0.05,
    confidence: float = 0.95,
    *,
    better: Better = "lower",
    name: str = "",
    unit: str = "s",
    paired: bool = False,
    apart: tuple[float, float] = (0.0, 0.0),
) -> Difference:
    """The verdict on one metric: the values of each round of both results.

    A difference is told if the ratio's interval excludes 1 and the ratio is beyond the threshold:
    above 1 + threshold, or below 1 / (1 + threshold). "no difference" means that none was found;
    how large a one may have gone unseen is what the interval says. Rounds are taken for independent
    of each other. Only what moves medians is seen: a longer tail is not (`tails`). None and rounds
    without values are passed over, with what they are paired with. "unknown" with fewer than
    LEAST_ROUNDS rounds, or too few pairs for an interval, or where a median is 0.

    paired: rounds of the same index were measured right after each other. apart: standard
    deviations of what all rounds of a, and of b, have in common by chance, in logarithms; not of
    pairs.
    """
    if not threshold >= 0:
        raise ValueError(f"a threshold of {threshold}: at least 0")
    if better not in ("lower", "higher"):
        raise ValueError(f"better {better!r}: lower or higher")
    if paired:
        both = [(x, y) for x, y in zip(a, b, strict=False) if _known(x) and _known(y)]
        a, b = [x for x, _ in both], [y for _, y in both]
    first, second = medians_of(a), medians_of(b)
    rounds = min(len(first), len(second))
    least = signed_rank_needed(confidence) if paired else LEAST_ROUNDS
    if rounds < least:
        reason = f"{rounds} of at least {least} {'pairs of ' if paired else ''}rounds"
        return Difference(name, unit, better, "unknown", reason=reason)
    if min(first.min(), second.min()) <= 0:
        return Difference(name, unit, better, "unknown", reason="a median is not above 0")
    logs = np.log(first), np.log(second)
    if paired:
        found = signed_rank_interval(logs[1] - logs[0], confidence)
        assert found is not None, "there are enough"
        middle, low, high = found
    else:
        middle, half = _welch(*logs, confidence, apart)
        low, high = middle - half, middle + half
    return Difference(
        name,
        unit,
        better,
        judge(middle, low, high, threshold, better),
        a=math.exp(float(logs[0].mean())),
        b=math.exp(float(logs[1].mean())),
        ratio=math.exp(middle),
        low=math.exp(low),
        high=math.exp(high),
    )


def judge(middle: float, low: float, high: float, threshold: float, better: Better) -> Verdict:
    """On the logarithm of a ratio b / a, and its interval."""
    if low <= 0 <= high or abs(middle) <= math.log1p(threshold):
        return "no difference"
    return "slower" if (middle > 0) == (better == "lower") else "faster"


def compare_results(
    a: Mapping[str, Any], b: Mapping[str, Any], threshold: float = 0.05, confidence: float = 0.95
) -> list[Difference]:
    """Every metric with rounds in both results, in the order of the first, and the scenario's own
    quantile of latency; of a rate whether it kept its bound, of a search the highest that did;
    where none of these is there, throughput; then how many requests failed.

    ValueError that names what differs if they are not of the same workload, scenario and task, or
    have no metric in common.
    """
    differing = unlike(a, b)
    names = [name for name in _rounds(a) if name in _rounds(b)]
    for name in [*names, *([] if names else [RATE, WHOLE])]:
        of_a, of_b = (_metric(result, name) for result in (a, b))
        for key in ("unit", "better") if of_a and of_b else ():
            differing += _unlike(of_a.get(key), of_b.get(key), f"metrics.{name}.{key}")
    _refuse(differing)
    found = [_of_rounds(name, a, b, threshold, confidence) for name in names]
    if LATENCY in names and (share := own_quantile(a)) is not None:
        surer = max(confidence, TAIL_CONFIDENCE)
        found.append(_of_rounds(LATENCY, a, b, TAIL_THRESHOLDS * threshold, surer, share))
    if (kept := _compare_kept(a, b)) is not None:
        found.append(kept)
    if is_search(a):
        found.append(_compare_searches(a, b, threshold))
    elif not found and all(_metric(each, WHOLE).get("value") is not None for each in (a, b)):
        found.append(_by_threshold(WHOLE, a, b, threshold))
    if not found:
        raise ValueError("results that cannot be compared: no metric has rounds in both")
    told = a.get("outcomes") and b.get("outcomes")
    return [*found, compare_failures(a, b, threshold)] if told else found


def _of_rounds(
    name: str,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    threshold: float,
    confidence: float,
    share: float | None = None,
) -> Difference:
    """Of launches, where a result has several; else of its rounds, with what one launch hides.

    share: of the quantile that is compared; None for medians.
    """
    paired = took_turns(a, b)
    known = [None if paired else _launches(result, name, share) for result in (a, b)]
    rounds = [_rounds(result)[name] for result in (a, b)]
    if share is not None:
        rounds = tails(share, *rounds) if paired else [tails(share, each)[0] for each in rounds]
    units = [each or own for each, own in zip(known, rounds, strict=True)]
    one, other = (0.0 if paired or each else LAUNCHES_APART for each in known)
    found = compare(
        units[0],
        units[1],
        threshold,
        confidence,
        better=_metric(a, name).get("better", "lower"),
        name=name if share is None else f"{name} {percentile(str(share))}",
        unit=_metric(a, name).get("unit", ""),
        paired=paired,
        apart=(one, other),
    )
    if not found.reason:
        return replace(found, reason=_alone(one > 0, other > 0))
    of_each = "" if share is None else f" of {needed(share)} requests each"
    return replace(found, reason=found.reason + of_each)


def _alone(a: bool, b: bool) -> str:
    """Why a verdict says less than its rounds seem to, of results of a single launch."""
    if not a and not b:
        return ""
    whose = "each" if a and b else f"of {'a' if a else 'b'}"
    return f"one launch {whose}: builds may differ by a few percent for that alone"


def _compare_kept(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference | None:
    """Whether a rate that was given kept its bound, in all launches; None where none was."""
    if is_search(a) or not all(loads(each) for each in (a, b)):
        return None
    kept = [rate_kept(result) for result in (a, b)]
    first, second = (None if each is None else float(each) for each in kept)
    told = [VERDICTS[each] for each in kept]
    verdict: Verdict = "no difference"
    if None in kept:
        verdict = "unknown"
    elif kept[0] != kept[1]:
        verdict = "slower" if kept[0] else "faster"
    reason = f"{told[0]} in both" if kept[0] == kept[1] else f"{told[0]} in a, {told[1]} in b"
    return Difference(KEPT, "", "higher", verdict, first, second, reason=reason)


def _launches(result: Mapping[str, Any], name: str, share: float | None) -> Rounds | None:
    """Of each launch its one value, the geometric mean of its rounds' medians, or of their
    quantiles; None with fewer than LEAST_LAUNCHES that have one.
    """
    found = []
    for launch in result.get("each_launch") or ():
        rounds = (launch.get("rounds") or {}).get(name) or ()
        medians = medians_of(rounds if share is None else tails(share, rounds)[0])
        if len(medians) and medians.min() > 0:
            found.append([math.exp(float(np.log(medians).mean()))])
    return found if len(found) >= LEAST_LAUNCHES else None


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what they differ that results which are compared must have in common, "scenario.name:
    offline, server"; known before anything is measured.
    """
    free: tuple[str, ...] = FREE + IMPLIED
    if is_search(a) and is_search(b):  # the rate that is found depends on how long it was tried
        free = tuple(name for name in free if name != "seconds")
    if _outstanding_by_default(a) and _outstanding_by_default(b):
        free += ("outstanding",)
    a, b = (with_quantile(result) for result in (a, b))
    return [line for part in SAME for line in _unlike(a.get(part), b.get(part), part, free)]


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """ValueError if there is something in `unlike`."""
    _refuse(unlike(a, b))


def _refuse(differing: Sequence[str]) -> None:
    if differing:
        raise ValueError(f"results that cannot be compared differ in {'; '.join(differing)}")


def took_turns(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether they are the two of a pair."""
    told = [(result.get("turns") or {}).get("id") for result in (a, b)]
    return told[0] is not None and told[0] == told[1]


def _outstanding_by_default(result: Mapping[str, Any]) -> bool:
    asked = (result.get("scenario") or {}).get("outstanding")
    return bool(asked == outstanding((result.get("workload") or {}).get("slots")))


def outstanding(slots: int | None) -> int:
    """Requests under way of the offline scenario, where it was not said how many."""
    return OUTSTANDING_A_SLOT * (slots or SLOTS_UNKNOWN)


def _compare_searches(a: Mapping[str, Any], b: Mapping[str, Any], threshold: float) -> Difference:
    """A difference is told if one's highest rate is beyond the other's by more than the threshold
    wherever in their intervals they are; that there is none, only of searches that were decided.
    """
    (low_a, high_a, decided_a), (low_b, high_b, decided_b) = _searched(a), _searched(b)
    first, second = (_metric(result, RATE).get("value") for result in (a, b))
    undecided = [name for name, ok in (("a", decided_a), ("b", decided_b)) if not ok]
    verdict: Verdict = "unknown" if undecided else "no difference"
    if high_b * (1 + threshold) < low_a:
        verdict = "slower"
    elif high_a * (1 + threshold) < low_b:
        verdict = "faster"
    none = [name for name, value in (("a", first), ("b", second)) if not value]
    reason = f"no rate kept the bound in {' and '.join(none)}" if none else ""
    if verdict == "unknown":
        reason = reason or f"the search of {' and '.join(undecided)} is undecided"
    return Difference(
        RATE,
        "1/s",
        "higher",
        verdict,
        a=first,
        b=second,
        ratio=second / first if first and second else None,
        low=low_b / high_a if high_a and math.isfinite(high_a) else None,
        high=high_b / low_a if low_a and math.isfinite(high_b) else None,
        reason=reason,
    )


def _searched(result: Mapping[str, Any]) -> tuple[float, float, bool]:
    """(a rate that was shown to keep the bound, one that was shown not to, whether nothing between
    them is open); 0 and infinity where there is none.

    Results of before searches told their interval have a rate alone, and their points.
    """
    told = result.get("search")
    if told:
        low, high = told.get("low"), told.get("high")
        return low or 0.0, math.inf if high is None else high, bool(told.get("decided"))
    value = _metric(result, RATE).get("value")
    if value is not None:
        return value, value, True
    missed = [each["rate"] for each in result.get("load") or () if each.get("met") is False]
    return 0.0, min(missed, default=math.inf), False


def _by_threshold(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], threshold: float
) -> Difference:
    """Of a metric that is one number, found once: without an interval."""
    first, second = (float(_metric(result, name)["value"]) for result in (a, b))
    better: Better = _metric(a, name).get("better", "lower")
    unit, reason = _metric(a, name).get("unit", ""), "by the threshold alone"
    if not first:
        verdict: Verdict = "unknown" if second else "no difference"
        return Difference(name, unit, better, verdict, first, second, reason="it was 0")
    ratio = second / first
    apart = not 1 / (1 + threshold) <= ratio <= 1 + threshold
    worse = (ratio > 1) == (better == "lower")
    verdict = "no difference" if not apart else "slower" if worse else "faster"
    return Difference(name, unit, better, verdict, first, second, ratio, reason=reason)


def compare_failures(a: Mapping[str, Any], b: Mapping[str, Any], threshold: float) -> Difference:
    """The share of requests that were not answered; "slower" if it grew beyond the threshold."""
    first, second = _failed(a), _failed(b)
    grown = second - first
    verdict: Verdict = (
        "slower" if grown > threshold else "faster" if -grown > threshold else "no difference"
    )
    return Difference(NOT_ANSWERED, "", "lower", verdict, first, second)


def _failed(result: Mapping[str, Any]) -> float:
    outcomes = result.get("outcomes") or {}
    total = sum(outcomes.values())
    return 1 - outcomes.get("ok", 0) / total if total else 0.0


def _metric(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return (result.get("metrics") or {}).get(name) or {}


def differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What may differ between results that are compared, and does: "machine.cpu: x, y"."""
    models = [result.get("model") or {} for result in (a, b)]
    passing: tuple[str, ...] = PASSING
    if models[0].get("contents_hash") and _same(models, "contents_hash"):
        passing += ("bundle_hash",)  # two exports of the same
    lines = [line for part in LISTED for line in _unlike(a.get(part), b.get(part), part, passing)]
    for part in SAME:
        of_a, of_b = (result.get(part) for result in (a, b))
        if isinstance(of_a, Mapping) and isinstance(of_b, Mapping):
            for key in FREE:
                lines += _unlike(of_a.get(key), of_b.get(key), f"{part}.{key}")
    alone = sorted(_rounds(a).keys() ^ _rounds(b).keys())
    lines += [f"metrics.{name}: in one of them only" for name in alone]
    lines += [f"{name} was interrupted" for name, each in (("a", a), ("b", b)) if _ended(each)]
    hashed = [name for name in ("bundle_hash", "contents_hash") if name not in passing]
    other = not all(_same(models, name) for name in hashed)
    if other and not all(model.get("evaluation") for model in models):
        lines.append("model.evaluation: not known of both, so what is faster may be worse")
    return lines


def _ended(result: Mapping[str, Any]) -> bool:
    return bool(result.get("interrupted"))


def _same(models: Sequence[Mapping[str, Any]], name: str) -> bool:
    return models[0].get(name) == models[1].get(name)


def to_json(
    differences: Sequence[Difference], differing: Sequence[str], threshold: float
) -> dict[str, Any]:
    """differing: lines as of `differs`."""
    return {
        "schema": SCHEMA,
        "threshold": threshold,
        "differences": [asdict(each) | {"launches": [*each.launches]} for each in differences],
        "differs": list(differing),
    }


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
    several = any(each.launches for each in differences)
    for head in HEADS if several else (head for head in HEADS if head != "launches"):
        table.add_column(head, justify="left" if head in ("metric", "verdict") else "right")
    for each in differences:
        verdict = f"{each.verdict}: {each.reason}" if each.reason else each.verdict
        values = (quantity(value, each.unit) for value in (each.a, each.b))
        ratios = (_number(each.ratio), _interval(each), *((_spread(each),) if several else ()))
        cells = (each.name, *values, *ratios, verdict)
        table.add_row(*map(Text, cells), style=STYLES[each.verdict])
    console.print(table)
    for line in differing:
        console.print(Text(f"differs: {line}"), soft_wrap=True)


def baseline_exit(differences: Sequence[Difference]) -> int:
    """The exit status of a comparison with a baseline: 1 if anything is slower than there, or if
    nothing could be told.
    """
    verdicts = [each.verdict for each in differences if each.name != NOT_ANSWERED]
    slower = any(each.verdict == "slower" for each in differences)
    return int(slower or all(verdict == "unknown" for verdict in verdicts))


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def medians_of(rounds: Rounds) -> np.ndarray:
    return np.array([np.median(values) for each in rounds if (values := _known(each))])


def _welch(
    a: np.ndarray, b: np.ndarray, confidence: float, apart: tuple[float, float]
) -> tuple[float, float]:
    """mean(b) - mean(a), and half the width of its interval. apart: as in compare; taken for known,
    and so without degrees of freedom of its own.
    """
    difference = float(b.mean() - a.mean())
    of_a, of_b = (float(each.var(ddof=1)) / len(each) for each in (a, b))
    squared = of_a + of_b + apart[0] ** 2 + apart[1] ** 2
    if not squared:
        return difference, 0.0
    share_a, share_b = of_a / squared, of_b / squared
    unsure = share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1)
    freedom = 1 / max(unsure, 1 / MOST_FREEDOM)
    return difference, student_t(confidence, freedom) * math.sqrt(squared)


def _rounds(result: Mapping[str, Any]) -> dict[str, Rounds]:
    """Those of the metrics that the result has."""
    metrics, rounds = result.get("metrics") or {}, result.get("rounds") or {}
    return {name: each for name, each in rounds.items() if metrics.get(name) and each}


def _unlike(a: Any, b: Any, where: str, free: Sequence[str] = ()) -> Iterator[str]:
    """Where two JSON values differ, and how; names in `free` do not count, and objects are gone
    through, also where the other one has none.
    """
    if isinstance(a, Mapping) and b is None:
        b = {}
    elif isinstance(b, Mapping) and a is None:
        a = {}
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


def _spread(each: Difference) -> str:
    ratios = each.launches
    return f"{_number(min(ratios))} .. {_number(max(ratios))}" if ratios else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
