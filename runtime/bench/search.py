"""The highest rate of requests at which latency keeps to its bound: MLPerf's Server scenario.

A rate is met, missed, or undecided after as many requests as it may take (verdict.py). An undecided
one is near the answer, which is then looked for below it, and what is surely too much above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MOST = 16  # points of a search
CLOSE = 0.03  # of the rate, at which the search is over
DOUBLINGS = 6
VERDICTS = {True: "kept", False: "missed", None: "undecided"}  # of a point's `met`
NEAR = 1.4  # times an undecided rate: the next to be tried


@dataclass(frozen=True)
class Point:
    """What was seen at a rate. p50, p99, quantile (that of the bound): of latency, None where too
    few were asked for these; met: whether the bound held and the queue did not grow, None where too
    few were asked to say; needed: how many more would say of the bound; sustained: whether it was
    shown that the queue did not grow, and all was answered; growth: seconds of latency that each
    second added.
    """

    rate: float
    achieved: float
    p50: float | None
    p99: float | None
    met: bool | None
    needed: int = 0
    sustained: bool = True
    growth: float | None = None
    quantile: float | None = None
    queries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """low: the highest rate that was met, high: the lowest that was missed; decided: that nothing
    between them was undecided.
    """

    low: float | None
    high: float | None
    decided: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def found(points: Sequence[Point]) -> Found:
    low, high, between = _bracket(points)
    return Found(low, high, low is not None and high is not None and not between)


def next_rate(points: Sequence[Point], guess: float) -> float | None:
    """What to try after these points; None when the search is over.

    guess: where to begin, such as the throughput with many requests under way.
    """
    if not points:
        return guess
    low, high, between = _bracket(points)
    if len(points) >= MOST:
        return None
    if low is None:
        least = min(points, key=lambda point: point.rate)
        if sum(point.rate <= guess for point in points) > DOUBLINGS:
            return None
        return least.rate / (NEAR if least.met is None else 2)
    if high is None:
        most = max(points, key=lambda point: point.rate)
        if sum(point.rate >= guess for point in points) > DOUBLINGS:
            return None
        return most.rate * (NEAR if most.met is None else 1.5)
    above, below = (between[0], between[-1]) if between else (high, low)
    if above - low > CLOSE * above:
        return (low + above) / 2
    if between and high - below > 2 * CLOSE * high:  # where the answer is not, but an end of it
        return (below + high) / 2
    return None


def _bracket(points: Sequence[Point]) -> tuple[float | None, float | None, list[float]]:
    """The highest met, the lowest missed, and what was undecided between them."""
    high = min((point.rate for point in points if point.met is False), default=None)
    rates = [point for point in points if high is None or point.rate < high]
    low = max((point.rate for point in rates if point.met), default=None)
    between = sorted(
        point.rate for point in rates if point.met is None and (low is None or point.rate > low)
    )
    return low, high, between
