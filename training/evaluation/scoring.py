"""Sums up: means, intervals, ceilings and Fréchet distances of a part; which bars hold.

Knows scores by name and kind ("model", "real", "reconstructed", ...); knows no task and no judge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import metrics
from .question import Bar

MODEL, REAL, RECONSTRUCTED = "model", "real", "reconstructed"


class Tally:
    """The scores and features of one kind of clips, gathered answer by answer."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.features: dict[str, list[np.ndarray]] = {}

    def add(self, scores: dict[str, float], features: dict[str, np.ndarray]) -> None:
        """`scores` may lack those that the question does not have."""
        for name, value in scores.items():
            self.values.setdefault(name, []).append(value)
        for name, vector in features.items():
            self.features.setdefault(name, []).append(vector)

    def mean(self, name: str) -> float:
        return float(np.mean(self.values[name]))


def summary(
    tallies: dict[str, Tally], reference: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """{score: {model, low, high, real, reconstructed, ratio, samples, ...}}.

    low, high: bootstrap 95 % interval of the model's mean. ratio: model / ceiling. A figure
    without a meaning is None. reference: {distance: f64[M,D]}, real features to compare with.
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
    values = np.array(tallies[MODEL].values[name])
    low, high = metrics.bootstrap_interval(values)
    # A real clip equals itself: its PSNR and SSIM with itself are no ceilings.
    trivial = name.startswith(("psnr", "ssim"))
    means = {
        kind: tally.mean(name)
        for kind, tally in tallies.items()
        if name in tally.values and not (trivial and kind == REAL)
    }
    row = _blank(tallies) | means | {"low": low, "high": high, "samples": len(values)}
    ceiling = _ceiling(row)
    if ceiling and not name.startswith("psnr"):
        row["ratio"] = row[MODEL] / ceiling
    return row


def _blank(tallies: dict[str, Tally]) -> dict[str, Any]:
    named = (MODEL, "low", "high", REAL, RECONSTRUCTED, "ratio")
    further = [kind for kind in tallies if kind not in named]
    return dict.fromkeys((*named, *further))


def _ceiling(row: dict[str, Any]) -> float | None:
    """What a perfect model could reach through its tokenizer; without one, the real clips'."""
    return row[REAL] if row[RECONSTRUCTED] is None else row[RECONSTRUCTED]


def judge_bars(part: str, bars: Iterable[Bar], scores: dict[str, dict]) -> list[dict[str, Any]]:
    """Whether each bar holds, against the ceiling of reconstructed clips and that of real ones.

    A bar on a score that no sample had, such as an edit that the split does not allow, is left
    out.
    """
    rows = []
    for bar in bars:
        if bar.score not in scores:
            continue
        score = scores[bar.score]
        value, real, ceiling = score[MODEL], score[REAL], _ceiling(score)
        needs_ceiling = bar.kind != "value"
        worthless = bar.kind == "ceiling" and value <= 0  # a share of nothing is nothing
        if needs_ceiling and ceiling is None:
            continue
        rows.append(
            {
                "part": part,
                "score": bar.score,
                "bar": str(bar),
                "value": value,
                "ceiling": ceiling,
                "ratio": score["ratio"],
                "threshold": bar.threshold(ceiling or 0.0),
                "holds": not worthless and value >= bar.threshold(ceiling or 0.0),
                "holds_against_real": None
                if needs_ceiling and real is None
                else not worthless and value >= bar.threshold(real or 0.0),
            }
        )
    return rows
