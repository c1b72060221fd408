"""Several launches of one run as one result, and of two runs compared as one.

How fast a process is depends on how it came to lie in memory, and stays so until it ends: two of
the same build may differ by some percent in all of their rounds. More rounds do not show that, more
processes do. So of each launch the ratio counts, and what is told is what launches agree about.
Source: Kalibera and Jones, Rigorous benchmarking in reasonable time, 2013, who repeat what is
nondeterministic at the highest level.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .compare import (
    NOT_ANSWERED,
    Difference,
    compare_failures,
    compare_results,
    judge,
    medians_of,
)
from .statistics import student_t

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  # results a and b of one launch
LEAST = 2  # launches of which there is an interval
# Parts of each launch's result that are kept.
OF_EACH = ("when", "outcomes", "metrics", "load", "rounds")


def compare_launches(
    pairs: Sequence[Pair], threshold: float = 0.05, confidence: float = 0.95
) -> list[Difference]:
    """As compare_results, and a ValueError also if there is no launch.

    Of several `a`, `b` and `ratio` are geometric means of theirs, and the interval is Student's, of
    the logarithms of their ratios. Launches that do not know a ratio are passed over; it is
    "unknown" where fewer than LEAST know it.
    """
    if not pairs:
        raise ValueError("no launch has results of both")
    if len(pairs) == 1:
        return compare_results(*pairs[0], threshold, confidence)
    launches = [
        {each.name: each for each in compare_results(a, b, threshold, confidence)} for a, b in pairs
    ]
    names = dict.fromkeys(name for one in launches for name in one)
    found = [
        _together([one[name] for one in launches if name in one], threshold, confidence)
        for name in names
        if name != NOT_ANSWERED
    ]
    if NOT_ANSWERED in names:
        a, b = (_outcomes(results) for results in zip(*pairs, strict=True))
        found.append(compare_failures(a, b, threshold))
    return found


def together(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of those of each launch, in order: that of the middle one by what is compared
    first, with what ended how in all of them, and `each_launch`.

    Figures are not pooled: what one launch has in common is no noise within it.
    """
    assert results, "at least one"
    middle = sorted(results, key=_pace)[(len(results) - 1) // 2]
    number = next(at for at, each in enumerate(results, 1) if each is middle)
    said = dict.fromkeys(note for each in results for note in each.get("notes") or ())
    about = (
        f"Figures are of launch {number} of {len(results)}, the middle one; --compare takes "
        "all of them."
    )
    return {
        **middle,
        "when": results[0]["when"],
        "notes": [*([about] if len(results) > 1 else []), *said],
        "outcomes": _outcomes(results)["outcomes"],
        "each_launch": [{name: each.get(name) for name in OF_EACH} for each in results],
        **({"interrupted": True} if any(each.get("interrupted") for each in results) else {}),
    }


def _pace(result: Mapping[str, Any]) -> float:
    """The mean of the medians of its rounds, of the first metric that has any; 0 without."""
    for rounds in (result.get("rounds") or {}).values():
        if (medians := medians_of(rounds)).size:
            return float(medians.mean())
    return 0.0


def _together(launches: Sequence[Difference], threshold: float, confidence: float) -> Difference:
    known = [each for each in launches if each.ratio is not None]
    ratios = tuple(each.ratio for each in known if each.ratio is not None)
    if len(known) < LEAST:
        reason = f"known of {len(known)} of at least {LEAST} launches"
        reason += next((f": {each.reason}" for each in launches if each.reason), "")
        return Difference(
            launches[0].name,
            launches[0].unit,
            launches[0].better,
            "unknown",
            reason=reason,
            launches=ratios,
        )
    logs = np.log(ratios)
    middle = float(logs.mean())
    half = student_t(confidence, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    low, high = middle - half, middle + half
    return replace(
        known[0],
        verdict=judge(middle, low, high, threshold, known[0].better),
        a=_mean([each.a for each in known]),
        b=_mean([each.b for each in known]),
        ratio=math.exp(middle),
        low=math.exp(low),
        high=math.exp(high),
        reason="",
        launches=ratios,
    )


def _mean(values: Sequence[float | None]) -> float:
    return math.exp(float(np.mean([math.log(value) for value in values if value])))


def _outcomes(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for each in results:
        total.update(each.get("outcomes") or {})
    return {"outcomes": dict(total)}
