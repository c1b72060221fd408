"""What the scores must reach, and whether they do.

A bar holds or not by the numbers measured. How far it could be otherwise by chance, its margin's
95 % interval says: value and threshold are resampled together, on the same questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..metrics import percentile_interval
from .scoring import MODEL, REAL, RECONSTRUCTED, Estimate, Tally, ceiling_of, estimates

KEPT = 0.95  # of the real clips' score that must survive the image tokenizer


@dataclass(frozen=True)
class Bar:
    """What a score must reach. kind says what `least` is:

    "ceiling": a share of the ceiling; "decibels": how many dB below the ceiling it may stay;
    "value": the score itself; "every": 1 in every single sample; "score": a share of another score
    of the model, `against`; "baseline": not used, the score must exceed that of the clips
    `against`.
    """

    score: str
    least: float = 1.0
    kind: str = "ceiling"
    against: str = ""

    def __str__(self) -> str:
        return {
            "ceiling": f"{self.score} >= {self.least:g} x ceiling",
            "decibels": f"{self.score} >= ceiling - {self.least:g} dB",
            "value": f"{self.score} >= {self.least:g}",
            "every": f"{self.score} in every sample",
            "score": f"{self.score} >= {self.least:g} x {self.against}",
            "baseline": f"{self.score} > {self.against}",
        }[self.kind]

    @property
    def is_share(self) -> bool:
        """A share of nothing is nothing: such a bar needs more than 0 on both sides."""
        return self.kind in ("ceiling", "score")

    def threshold(self, other: Any) -> Any:
        """The value to reach, from the ceiling, score or baseline it depends on: f64, or f64[R]."""
        match self.kind:
            case "ceiling" | "score":
                return self.least * other
            case "decibels":
                return other - self.least
            case "baseline":
                return other
        return self.least

    def reached(self, margin: float) -> bool:
        return margin > 0 if self.kind == "baseline" else margin >= 0


def judge_bars(part: str, bars: Iterable[Bar], tallies: dict[str, Tally]) -> list[dict[str, Any]]:
    """A row a bar: value, ceiling, threshold, margin with its interval, holds, and a verdict.

    holds: None where there is nothing to measure, such as an edit that the split does not allow.
    tokenizer_keeps: reconstructed clips reach KEPT of the real ones' score, without which no bar
    that is a share of theirs holds; None where it does not matter. holds_against_real: the same
    bar with the real clips' score for a ceiling. A bar on every sample has no interval: it says
    what was counted and estimates nothing.
    """
    return [_row(part, bar, tallies) for bar in bars]


def _row(part: str, bar: Bar, tallies: dict[str, Tally]) -> dict[str, Any]:
    by_kind = estimates(bar.score, tallies)
    model, ceiling = by_kind.get(MODEL), ceiling_of(by_kind)
    row: dict[str, Any] = {
        "part": part,
        "score": bar.score,
        "bar": str(bar),
        "samples": model.samples if model else 0,
        "value": model.value if model else None,
        "ceiling": ceiling.value if ceiling else None,
    }
    blank = ("threshold", "margin", "margin_low", "margin_high", "holds", "tokenizer_keeps")
    row |= dict.fromkeys((*blank, "holds_against_real"))
    other = _other(bar, by_kind, tallies)
    if model is None or other is None:
        missing = "0 samples" if model is None else f"no {bar.against or 'ceiling'}"
        return row | {"verdict": f"not measured ({missing})"}
    assert other.samples == model.samples, "a bar compares scores of the same questions"
    row["threshold"] = bar.threshold(other.value)
    row["margin"] = model.value - row["threshold"]
    row["tokenizer_keeps"] = _tokenizer_keeps(bar, by_kind)
    reached = _reached(bar, model, other)
    row["holds"] = reached and row["tokenizer_keeps"] is not False
    if bar.kind in ("ceiling", "decibels") and REAL in by_kind:
        row["holds_against_real"] = _reached(bar, model, by_kind[REAL])
    if bar.kind != "every":
        row["margin_low"], row["margin_high"] = percentile_interval(
            model.low_R - bar.threshold(other.high_R), model.high_R - bar.threshold(other.low_R)
        )
    return row | {"verdict": _verdict(bar, row, reached)}


def _other(bar: Bar, by_kind: dict[str, Estimate], tallies: dict[str, Tally]) -> Estimate | None:
    """What the bar's threshold depends on; for one that depends on nothing, the model itself."""
    match bar.kind:
        case "ceiling" | "decibels":
            return ceiling_of(by_kind)
        case "score":
            return tallies[MODEL].estimate(bar.against)
        case "baseline":
            return by_kind.get(bar.against)
    return by_kind.get(MODEL)


def _reached(bar: Bar, model: Estimate, other: Estimate) -> bool:
    if bar.is_share and min(model.value, other.value) <= 0:
        return False
    return bar.reached(model.value - bar.threshold(other.value))


def _tokenizer_keeps(bar: Bar, by_kind: dict[str, Estimate]) -> bool | None:
    if bar.kind != "ceiling" or not {REAL, RECONSTRUCTED} <= set(by_kind):
        return None
    return by_kind[RECONSTRUCTED].value >= KEPT * by_kind[REAL].value


def _verdict(bar: Bar, row: dict[str, Any], reached: bool) -> str:
    if reached and not row["holds"]:
        return f"does NOT hold: the tokenizer keeps less than {KEPT:g} of the real score"
    end = row["margin_low"] if reached else row["margin_high"]
    doubtful = end is not None and bar.reached(end) != reached
    return ("holds" if reached else "does NOT hold") + (", within noise" if doubtful else "")
