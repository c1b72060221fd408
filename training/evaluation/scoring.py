"""Sums up: means, their intervals, ceilings and Fréchet distances of a part.

A score is a number a sample, whose mean counts, or a confusion matrix a sample, whose sum gives a
mean IoU. Intervals come from resampling the questions, the same ones for all kinds of clips, so
what is computed from two of them is paired. Where every sample has 0, or every one has 1,
resamples cannot differ and would give an interval of no width: Wilson's stands in.

Knows scores by name and kind ("model", "real", "reconstructed", ...); knows no task and no judge.

Shapes: N samples, R resamples, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import metrics

MODEL, REAL, RECONSTRUCTED = "model", "real", "reconstructed"

Score = float | np.ndarray  # of one sample: a number, or pixels i64[C,C] by label and target


@dataclass(frozen=True)
class Estimate:
    """A score over all samples, and over resamples of them f64[R].

    low_R, high_R: the same, but where Wilson's interval stands in for them.
    """

    value: float
    samples: int
    low_R: np.ndarray
    high_R: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return metrics.percentile_interval(self.low_R, self.high_R)

    def less(self, other: Estimate) -> tuple[float, float]:
        """95 % interval of this score less another one of the same samples."""
        return metrics.percentile_interval(self.low_R - other.high_R, self.high_R - other.low_R)


def estimate(scores: list[Score]) -> Estimate:
    """Of at least one sample, all of them numbers or all of them matrices."""
    values = np.array(scores, np.float64)
    if values.ndim == 3:
        resamples_R = metrics.mean_iou_of(metrics.resampled_means(values))
        value = float(metrics.mean_iou_of(values.sum(0)))
        return Estimate(value, len(values), resamples_R, resamples_R)
    value = float(values.mean())
    if value in (0.0, 1.0) and (values == value).all():
        low, high = metrics.wilson_interval(value, len(values))
        return Estimate(value, len(values), _constant(low), _constant(high))
    resamples_R = metrics.resampled_means(values)
    return Estimate(value, len(values), resamples_R, resamples_R)


def _constant(value: float) -> np.ndarray:
    return np.full(metrics.RESAMPLES, value)


class Tally:
    """The scores and features of one kind of clips, gathered answer by answer."""

    def __init__(self) -> None:
        self.values: dict[str, list[Score]] = {}
        self.features: dict[str, list[np.ndarray]] = {}
        self._estimates: dict[str, Estimate] = {}

    def add(self, scores: Mapping[str, Score], features: Mapping[str, np.ndarray]) -> None:
        """`scores` may lack those that the question does not have."""
        self._estimates.clear()
        for name, value in scores.items():
            self.values.setdefault(name, []).append(value)
        for name, vector in features.items():
            self.features.setdefault(name, []).append(vector)

    def estimate(self, name: str) -> Estimate | None:
        """None where no sample has that score."""
        if name not in self.values:
            return None
        if name not in self._estimates:
            self._estimates[name] = estimate(self.values[name])
        return self._estimates[name]


def estimates(name: str, tallies: dict[str, Tally]) -> dict[str, Estimate]:
    """One score by kind of clips, where it means something."""
    found = {}
    for kind, tally in tallies.items():
        # A real clip equals itself: its PSNR and SSIM with itself are no ceilings.
        trivial = kind == REAL and name.startswith(("psnr", "ssim"))
        one = None if trivial else tally.estimate(name)
        if one is not None:
            found[kind] = one
    return found


def ceiling_of(by_kind: dict[str, Any]) -> Any:
    """What a perfect model could reach through its tokenizer; else the real clips', or None."""
    ceiling = by_kind.get(RECONSTRUCTED)
    return by_kind.get(REAL) if ceiling is None else ceiling


def summary(
    tallies: dict[str, Tally], reference: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """{score: {model, low, high, real, reconstructed, ratio, samples, intervals, ...}}.

    low, high: 95 % interval of the model's score; intervals: of the other kinds'. ratio: model /
    ceiling. A figure without a meaning is None. reference: {distance: f64[M,D]}, real features to
    compare with.
    """
    scores = {name: _score(name, tallies) for name in tallies[MODEL].values}
    for name, features_MD in reference.items():
        scores[name] = _blank(tallies) | {
            kind: metrics.frechet_distance(np.stack(tally.features[name]), features_MD)
            for kind, tally in tallies.items()
        }
        scores[name]["samples"] = len(tallies[MODEL].features[name])
    return scores


def _score(name: str, tallies: dict[str, Tally]) -> dict[str, Any]:
    by_kind = estimates(name, tallies)
    low, high = by_kind[MODEL].interval
    row = _blank(tallies) | {kind: each.value for kind, each in by_kind.items()}
    row |= {"low": low, "high": high, "samples": by_kind[MODEL].samples}
    row["intervals"] = {kind: list(e.interval) for kind, e in by_kind.items() if kind != MODEL}
    ceiling = ceiling_of(row)
    if ceiling and not name.startswith("psnr"):
        row["ratio"] = row[MODEL] / ceiling
    return row


def _blank(tallies: dict[str, Tally]) -> dict[str, Any]:
    named = (MODEL, "low", "high", REAL, RECONSTRUCTED, "ratio")
    further = [kind for kind in tallies if kind not in named]
    return dict.fromkeys((*named, *further)) | {"intervals": {}}
