"""The highest rate of requests at which latency keeps to its bound: MLPerf's Server scenario."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

STEPS = 7
CLOSE = 0.03  # of the rate, at which the search is over
DOUBLINGS = 6


@dataclass(frozen=True)
class Point:
    """What was seen at a rate. p50, p99: of latency, None where too few were asked for these; met:
    whether the bound held, None where too few were asked to say; needed: how many more would say.
    """

    rate: float
    achieved: float
    p50: float | None
    p99: float | None
    met: bool | None
    needed: int = 0


def highest_rate(at: Callable[[float], Point], guess: float) -> tuple[float | None, list[Point]]:
    """(the highest rate whose point met the bound, None if none did; all points by rate).

    guess: where to begin, such as the throughput with many requests under way. If no point missed
    the bound, the highest may be higher still.
    """
    points: list[Point] = []

    def met(rate: float) -> bool:
        points.append(at(rate))
        return bool(points[-1].met)

    low, high = None, None
    rate = guess
    for _ in range(DOUBLINGS):  # brackets the answer
        if met(rate):
            low, rate = rate, rate * 1.5
            if high is not None:
                break
        else:
            high, rate = rate, rate / 2
            if low is not None:
                break
    for _ in range(STEPS):
        if low is None or high is None or high - low <= CLOSE * high:
            break
        middle = (low + high) / 2
        if met(middle):
            low = middle
        else:
            high = middle
    return low, sorted(points, key=lambda point: point.rate)
