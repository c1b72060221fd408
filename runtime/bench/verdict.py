"""Whether a system keeps up with a rate: latency within its bound, and a queue that does not grow.

MLPerf's rule for the bound takes queries for independent. In a queue they are not: who waits long
has neighbours who do. So the rule must hold for as many independent ones as they are worth, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import scenarios, statistics
from .observation import Observation
from .search import Point

LONG = 10.0  # times the bound that a run lasts at the least: a queue takes time to grow
GROWTH = 0.02  # of the rate that may go unanswered, or of a second that each second adds to latency
CONFIDENCE = 0.95
NEAR = 0.5  # times the bound: those over it have their neighbours looked at
TAIL = 0.9  # share of latencies that are below these at the least
FEW = 10  # queries over the bound, too few to look at theirs
RAMP = 0.1  # of the queries, before a queue's growth counts


@dataclass(frozen=True)
class Kept:
    """met: that queries kept the bound, or did not; None where neither was shown. more: queries
    that would show it if all of them kept it.
    """

    met: bool | None
    more: int


def bound_kept(late: Sequence[bool], tail: Sequence[bool], share: float) -> Kept:
    """By MLPerf's early stopping, and by as many independent queries as these are worth.

    late, tail: of each query in order, whether it was over the bound, or came near to it.
    """
    over, count = sum(late), len(late)
    plain = statistics.latency_bound(count - over, over, share)
    effect = statistics.design_effect(tail)
    if over >= FEW:
        effect = max(effect, statistics.design_effect(late))
    worth = max(int(count / effect), 1)
    less = min(math.ceil(over / effect), worth)
    kept = statistics.latency_bound(worth - less, less, share, CONFIDENCE)
    met = plain.met if plain.met is kept.met else None
    return Kept(met, 0 if met is not None else max(plain.more, math.ceil(kept.more * effect)))


@dataclass(frozen=True)
class Queue:
    """growth: seconds of latency that each second added, None where that cannot be said; steady: it
    was shown that it does not grow; growing: that it does.
    """

    growth: float | None
    steady: bool
    growing: bool


def queue_of(observed: Sequence[Observation]) -> Queue:
    """Of requests in the order in which they were due.

    Latency that grows by g seconds a second is that of a system asked for 1 + g times what it can
    do. Who was refused was not answered, either.
    """
    answered = [each for each in observed[int(RAMP * len(observed)) :] if each.ok]
    failed = sum(not each.ok for each in observed) / len(observed)
    lost = failed > GROWTH
    due, latencies = (
        [getattr(each, name) for each in answered] for name in ("scheduled", "latency")
    )
    line = statistics.slope(due, latencies, confidence=CONFIDENCE) if answered else None
    if line is None:
        return Queue(None, False, lost)
    growth, low, high = line
    steady = not lost and low <= GROWTH / 100 and failed + high <= GROWTH
    return Queue(growth, steady, lost or low > GROWTH)


def point(
    rate: float,
    observed: Sequence[Observation],
    bound: float,
    share: float,
    until: float = math.inf,
) -> Point:
    """What requests at a rate say of the bound; one that failed did not keep it.

    until: requests due later are left out, as nobody knows yet how those under way will do.
    """
    inorder = sorted(observed, key=lambda each: each.scheduled)
    known = [each for each in inorder if each.scheduled <= until]
    if not known:
        return Point(rate, 0.0, None, None, None, statistics.least_under(0, share), False)
    latencies = [each.latency for each in known if each.ok]
    late = [not each.ok or each.latency > bound for each in known]
    near = max(NEAR * bound, statistics.quantile(latencies, TAIL)) if latencies else 0.0
    tail = [not each.ok or each.latency > near for each in known]
    kept, queue = bound_kept(late, tail, share), queue_of(known)
    sustained = queue.steady and len(known) / rate >= (LONG - 2) * bound  # of those known, about
    met = False if kept.met is False or queue.growing else True if kept.met and sustained else None
    p50, p99, asked = (
        statistics.supported(latencies, each) if latencies else None for each in (0.5, 0.99, share)
    )
    return Point(
        rate,
        scenarios.achieved(known, 1).rate,
        p50,
        p99,
        met,
        kept.more if met is None else 0,
        sustained,
        queue.growth,
        asked,
        len(known),
        known[-1].scheduled - known[0].scheduled,
    )
