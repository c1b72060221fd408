"""What a sample of latencies or rates supports saying, and how many values the rest would take.

Quantiles and their intervals are order statistics: values that were measured, whatever their
distribution, never extrapolated. Latencies follow each other: who waits in a queue has neighbours
who do, and a machine has slow minutes. So a `summary` is of values in order of time, and its
intervals are of as many independent ones as they are worth (`serial_effect`). What else takes
values for independent draws says nothing of it; what drifts between rounds is compare.py's. Knows
no unit: results are in that of the values.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

SHARES = (0.5, 0.9, 0.95, 0.99)
# MLPerf's quantile of latency, by scenario; of server it is what was asked for.
JUDGED_BY = {"single-stream": 0.9, "multi-stream": 0.99}
EXACT_RANKS = 60  # values up to which the signed-rank statistic's chances are counted out
LEAST_WINDOWS = 3  # that a series must be steady for
# Numbers of batches that a series is cut into, to see how its neighbours depend on each other: few
# long ones see slow drift, many short ones say more surely what a queue does.
BATCHES = (10, 20)
LEAST_BATCH = 4  # values of a batch
MARKED = (0.1, 0.9)  # shares of values that are marked: few marks say nothing of neighbours


@dataclass(frozen=True)
class Quantile:
    """low, high: its interval, None where values depend so much on each other that they are worth
    too few. needs: how many values it takes, where there are too few for it; the others are None
    then.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    needs: int | None = None

    def to_json(self) -> dict[str, float]:
        """What is not None."""
        known = dataclasses.asdict(self).items()
        return {name: value for name, value in known if value is not None}


@dataclass(frozen=True)
class Summary:
    """deviation: the sample's standard deviation, None for a single value; quantiles: by share."""

    count: int
    mean: float
    deviation: float | None
    least: float
    most: float
    quantiles: dict[float, Quantile]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts that `from_json` reads back to an equal summary; shares become strings."""
        shares = {str(share): each.to_json() for share, each in self.quantiles.items()}
        return dataclasses.asdict(self) | {"quantiles": shares}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Summary:
        """KeyError for what is missing; what is no part of a summary is passed over."""
        shares = {float(share): Quantile(**each) for share, each in data["quantiles"].items()}
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: data[name] for name in names} | {"quantiles": shares})


@dataclass(frozen=True)
class EarlyStopping:
    """value: the estimate; discarded: how many slower queries it leaves out; needs: how many
    it takes, where there are too few queries.
    """

    value: float | None = None
    discarded: int = 0
    needs: int | None = None


@dataclass(frozen=True)
class Bound:
    """met: whether it is shown to hold, or not to; None where neither is. more: the queries that
    would show that it holds if all of them kept it; 0 where met is not None.
    """

    met: bool | None
    more: int = 0


def summary(
    values: npt.ArrayLike, shares: Sequence[float] = SHARES, confidence: float = 0.95
) -> Summary:
    """Of one value at least, in order of time. Quantiles that so many values cannot support are
    refused; their intervals are of as many as these are worth.
    """
    series = _checked(values)
    ordered = np.sort(series)
    return Summary(
        len(ordered),
        float(ordered.mean()),
        float(ordered.std(ddof=1)) if len(ordered) > 1 else None,
        float(ordered[0]),
        float(ordered[-1]),
        {share: _with_interval(series, ordered, share, confidence) for share in shares},
    )


def shares_with(share: float) -> tuple[float, ...]:
    """Those of SHARES, and the one that was asked for."""
    return tuple(sorted({*SHARES, share}))


def quantile(values: npt.ArrayLike, share: float) -> float:
    """Nearest rank: the smallest value with at least `share` of all at or below it."""
    _check_share(share)
    ordered = _ordered(values)
    # A decimal, as 0.07 * 100 is more than 7 in floats.
    return float(ordered[math.ceil(Decimal(str(float(share))) * len(ordered)) - 1])


def supported(values: npt.ArrayLike, share: float, confidence: float = 0.95) -> float | None:
    """The quantile alone; None with fewer than `needed`."""
    ordered = _ordered(values)
    return quantile(ordered, share) if len(ordered) >= needed(share, confidence) else None


def interval(
    values: npt.ArrayLike, share: float, confidence: float = 0.95, effect: float = 1.0
) -> tuple[float, float] | None:
    """Two values of the sample with the quantile between them, whatever the distribution.

    With equal tails: the quantile is below the lower one, and above the upper one, with a chance of
    at most (1 - confidence) / 2 each. effect: how many of the values tell as much as an independent
    one, as `serial_effect` says of them in order of time; then the ends are those of so many fewer
    values, at the same shares of the sample. None where they are worth fewer than `needed`.
    """
    ordered = _ordered(values)
    count = len(ordered)
    worth = int(count / effect)
    if worth < needed(share, confidence):
        return None
    low, high = _ranks(worth, share, confidence)
    if worth < count:
        scale = (count + 1) / (worth + 1)
        low, high = max(1, math.floor(low * scale)), min(count, math.ceil(high * scale))
    return float(ordered[low - 1]), float(ordered[high - 1])


def needed(share: float, confidence: float = 0.95) -> int:
    """The least number of values that the quantile is reported from: its `interval` exists.

    Both ends must be values of the sample, and so the chance that all values are on one side of the
    quantile at most (1 - confidence) / 2. At 95 %: 6 for the median, 36 for p90, 72 for p95, 368
    for p99 (an upper bound alone would take 299).
    """
    _check_share(share)
    _check_confidence(confidence)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(max(share, 1 - share)))


def mean_interval(values: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean; None for a single value.

    Of skewed values such as latencies it takes some dozens for it to be right that often.
    """
    ordered = _ordered(values)
    count = len(ordered)
    if count < 2:
        return None
    half = student_t(confidence, count - 1) * float(ordered.std(ddof=1)) / math.sqrt(count)
    mean = float(ordered.mean())
    return mean - half, mean + half


def signed_rank_interval(
    values: npt.ArrayLike, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """(middle, low, high) of what values lie around, which may be far off now and then.

    The middle is that of Hodges and Lehmann, the median of the means of all pairs, each value with
    itself among them; the interval is of Wilcoxon's signed-rank test: it takes the values for
    independent draws from one distribution that is symmetric about it. None with fewer than
    `signed_rank_needed`. Source: Hollander and Wolfe, Nonparametric Statistical Methods, 3.1-3.3.
    """
    series = _checked(values)
    count = len(series)
    if count < signed_rank_needed(confidence):
        return None
    left, right = np.triu_indices(count)
    means = np.sort((series[left] + series[right]) / 2)
    rank = _signed_rank(count, (1 - confidence) / 2)
    return float(np.median(means)), float(means[rank - 1]), float(means[-rank])


def signed_rank_needed(confidence: float = 0.95) -> int:
    """The least number of values with a `signed_rank_interval`: 6 at 95 %."""
    _check_confidence(confidence)
    return 1 + math.ceil(-math.log2(1 - confidence))


@lru_cache(maxsize=64)
def _signed_rank(count: int, tail: float) -> int:
    """The largest rank r such that the signed-rank statistic of `count` values is below r with a
    chance of at most `tail`.
    """
    total = count * (count + 1) // 2
    if count > EXACT_RANKS:
        deviation = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return max(1, math.floor(total / 2 + NormalDist().inv_cdf(tail) * deviation))
    chances = np.zeros(total + 1)  # of each value of the statistic
    chances[0] = 1.0
    for rank in range(1, count + 1):
        chances[rank:] = (chances[rank:] + chances[:-rank]) / 2
        chances[:rank] /= 2
    return int(np.searchsorted(np.cumsum(chances), tail, side="right"))


def early_stopping(values: npt.ArrayLike, share: float, confidence: float = 0.99) -> EarlyStopping:
    """MLPerf's estimate of a quantile of latency: SingleStream's of 0.9, MultiStream's of 0.99.

    The largest t is sought such that t queries over a bound, of as many as there are, would still
    show that it holds for `share` of all; the t - 1 slowest are discarded, and the slowest of the
    rest is the estimate. Refused where t is 0. Source: MLCommons, inference_rules.adoc, "Early
    Stopping Criterion", tolerance 0.
    """
    ordered = _ordered(values)
    count = len(ordered)
    enough = 1 + least_under(1, share, confidence)
    if count < enough:
        return EarlyStopping(needs=enough)
    over = -1 + _first(lambda over: binomial_cdf(over, count, 1 - share) > 1 - confidence, 0, count)
    return EarlyStopping(float(ordered[count - over]), over - 1)


def latency_bound(under: int, over: int, share: float = 0.99, confidence: float = 0.99) -> Bound:
    """MLPerf's rule for the Server scenario: do `share` of all queries keep the latency bound?

    under, over: how many of those that ended did, and did not. They do if there are enough by
    `least_under`. That they do not is said, as MLPerf never does, where a system that just keeps
    the bound would have so many over it with a chance of at most 1 - confidence.
    """
    more = least_under(over, share, confidence) - under
    if more <= 0:
        return Bound(True)
    if over and beta_cdf(1 - share, over, under + 1) <= 1 - confidence:
        return Bound(False)
    return Bound(None, more)


def design_effect(marks: npt.ArrayLike, batches: int = 20) -> float:
    """How many values in order tell as much as one of independent draws would; 1 at least.

    marks: 0 or 1 each. By batch means: the variance of the number of ones in a batch, beside that
    of a binomial one. 1 with fewer values than batches. Source: Kish, Survey Sampling, 1965.
    """
    return max(1.0, _batch_effect(_checked(marks), batches))


def serial_effect(values: npt.ArrayLike, share: float, confidence: float = 0.95) -> float:
    """How many values in order of time tell as much of a quantile as one independent draw; 1 at
    least.

    The design effect of which values are at or below the sample's quantile (of a share within
    MARKED). By several numbers of batches, the largest of what they say, each made larger by what
    so few batches do not know: Student's t beside the normal one's. Of independent values that
    makes intervals some 20 % wider. What goes up and down but a few times in the whole series is
    seen too little of, and so is all in fewer than LEAST_BATCH * min(BATCHES) values, which are
    taken for independent.
    """
    series = _checked(values)
    marks = series <= quantile(series, min(max(share, MARKED[0]), MARKED[1]))
    normal = NormalDist().inv_cdf((1 + confidence) / 2)
    found = (
        _batch_effect(marks, batches) * (student_t(confidence, batches - 1) / normal) ** 2
        for batches in BATCHES
        if len(series) >= LEAST_BATCH * batches
    )
    return max([1.0, *found])


def _batch_effect(marks: np.ndarray, batches: int) -> float:
    """The variance of the number of ones in a batch beside a binomial one; 0 where the marks do not
    say.
    """
    size = len(marks) // batches
    if not size:
        return 0.0
    counts = marks[: size * batches].reshape(batches, size).sum(axis=1)
    share = float(counts.mean()) / size
    if not 0 < share < 1:
        return 0.0
    return float(counts.var(ddof=1)) / (size * share * (1 - share))


def slope(
    x: npt.ArrayLike, y: npt.ArrayLike, batches: int = 10, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """(slope, low, high) of y against x, which are in order: a line through the means of batches,
    as neighbours are not independent. None with fewer than two values a batch.
    """
    of_x, of_y = _checked(x), _checked(y)
    size = len(of_x) // batches
    if size < 2:
        return None
    first = len(of_x) - size * batches
    left, right = (each[first:].reshape(batches, size).mean(axis=1) for each in (of_x, of_y))
    left, right = left - left.mean(), right - right.mean()
    spread = float(left @ left)
    if not spread:
        return None
    found = float(left @ right) / spread
    rest = right - found * left
    error = math.sqrt(float(rest @ rest) / (batches - 2) / spread)
    half = student_t(confidence, batches - 2) * error
    return found, found - half, found + half


def least_under(over: int, share: float, confidence: float = 0.99) -> int:
    """MLPerf's h_min(t): how many queries must be under a latency bound if t = `over` are not.

    The least h such that a system that is within the bound for only `share` of its queries has at
    most t of h + t over it with a chance of at most 1 - confidence.
    """
    _check_share(share)
    _check_confidence(confidence)
    if over < 0:
        raise ValueError(f"{over} queries over the bound: at least 0")

    def shown(under: int) -> bool:
        return binomial_cdf(over, under + over, 1 - share) <= 1 - confidence

    most = 1
    while not shown(most):
        most *= 2
    return _first(shown, 0, most)


def steady(values: npt.ArrayLike, window: int, tolerance: float) -> int | None:
    """Where the warm-up of a series ends: an index, a multiple of `window`.

    The first from which the medians of all windows to come are within `tolerance` (a share) of the
    median of all that is to come. None if no such index has LEAST_WINDOWS whole windows after it.
    A few slow values in a window do not move its median, and so do not make it warm-up.
    """
    if window < 1 or not 0 < tolerance < 1:
        raise ValueError(f"window {window}, tolerance {tolerance}: at least 1, and above 0 below 1")
    series = _checked(values)
    windows = len(series) // window
    medians = np.median(series[: windows * window].reshape(windows, window), axis=1)
    below, above = 1 - tolerance, 1 + tolerance
    for first in range(windows - LEAST_WINDOWS + 1):
        least, most = medians[first:].min(), medians[first:].max()
        if below * most > above * least:
            continue  # nothing is within the tolerance of both
        middle = np.median(series[first * window :])
        if below * middle <= least and most <= above * middle:
            return first * window
    return None


def binomial_cdf(successes: int, trials: int, chance: float) -> float:
    """The probability of at most so many successes."""
    if successes < 0:
        return 0.0
    if successes >= trials:
        return 1.0
    return beta_cdf(1 - chance, trials - successes, successes + 1)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), to about nine digits for a + b of 10^6.

    By its continued fraction (DLMF 8.17.22), where that converges in about sqrt(max(a, b)) steps.
    """
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    logarithm = scale + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    return math.exp(logarithm) * _beta_fraction(x, a, b)


@lru_cache(maxsize=256)
def student_t(confidence: float, freedom: float) -> float:
    """The t that Student's variable with so many degrees of freedom is within, on both sides."""
    _check_confidence(confidence)
    low, high = 0.0, 1.0  # of t^2 / (freedom + t^2), which is of a beta distribution
    for _ in range(100):
        middle = (low + high) / 2
        if beta_cdf(middle, 0.5, freedom / 2) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom * low / (1 - low))


def _beta_fraction(x: float, a: float, b: float) -> float:
    """By Lentz's method: c and d are the ratios of successive numerators and denominators."""
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in itertools.count(1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            value *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return value


@lru_cache(maxsize=256)
def _ranks(count: int, share: float, confidence: float) -> tuple[int, int]:
    """Of the ends of `interval`, from 1, for at least `needed` values."""
    tail = (1 - confidence) / 2
    low = _first(lambda rank: binomial_cdf(rank, count, share) > tail, 1, count)
    # The quantile is above as many values as there are successes.
    high = _first(lambda rank: beta_cdf(share, rank, count - rank + 1) <= tail, 1, count)
    return low, high


def _with_interval(
    series: np.ndarray, ordered: np.ndarray, share: float, confidence: float
) -> Quantile:
    """series: the values in order of time; ordered: by size."""
    least = needed(share, confidence)
    if len(series) < least:
        return Quantile(needs=least)
    effect = serial_effect(series, share, confidence)
    ends = interval(ordered, share, confidence, effect) or (None, None)
    return Quantile(quantile(ordered, share), *ends)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first of low .. high from which on it holds; high if it does not before."""
    return low + bisect.bisect_left(range(low, high), True, key=holds)


def _ordered(values: npt.ArrayLike) -> np.ndarray:
    return np.sort(_checked(values))


def _checked(values: npt.ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values of shape {array.shape}: a list of at least one")
    if not np.isfinite(array).all():
        raise ValueError("some values are not finite")
    return array


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"a quantile of {share}: above 0 and below 1")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}: above 0 and below 1")
