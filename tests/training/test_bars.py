"""Estimates and bars, from values whose outcome is plain."""

from __future__ import annotations

import numpy as np
import pytest

from nuwa.training.evaluation.bars import Bar, judge_bars
from nuwa.training.evaluation.scoring import (
    MODEL,
    REAL,
    RECONSTRUCTED,
    Tally,
    estimate,
    summary,
)
from nuwa.training.metrics import wilson_interval


def _tally(**scores) -> Tally:
    tally = Tally()
    for name, values in scores.items():
        for value in values:
            tally.add({name: value}, {})
    return tally


def _row(bar, model, **others):
    tallies = {MODEL: _tally(x=model)} | {kind: _tally(x=each) for kind, each in others.items()}
    (row,) = judge_bars("part", [bar], tallies)
    return row


def _share(ones, count=100):
    return [1.0] * ones + [0.0] * (count - ones)


def test_values_that_are_all_alike_get_wilsons_interval():
    assert estimate([1.0] * 20).interval == wilson_interval(1.0, 20)
    assert estimate([0.0] * 20).interval == wilson_interval(0.0, 20)
    assert estimate([30.0] * 20).interval == (30.0, 30.0), "not a share"
    low, high = estimate(_share(50)).interval
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62


def test_a_matrix_a_sample_is_pooled_before_it_is_scored():
    """The first sample is a large perfect one, the second a small one that is all wrong."""
    large, small = np.diag([90, 10]), np.array([[0, 4], [6, 0]])
    pooled = estimate([large, small])
    assert pooled.value == pytest.approx((90 / 100 + 10 / 20) / 2)
    low, high = pooled.interval
    assert (low, high) == (0.0, 1.0), "both twice, and the other one twice"
    assert pooled.samples == 2


@pytest.mark.parametrize(
    ("correct", "holds", "verdict"),
    [
        (99, True, "holds"),
        (91, True, "holds, within noise"),
        (89, False, "does NOT hold, within noise"),
        (60, False, "does NOT hold"),
    ],
)
def test_the_verdict_follows_the_value_and_names_the_noise(correct, holds, verdict):
    row = _row(Bar("x", 0.90, "value"), _share(correct))
    assert (row["holds"], row["verdict"], row["samples"]) == (holds, verdict, 100)
    assert row["margin"] == pytest.approx(correct / 100 - 0.90)
    assert row["margin_low"] < row["margin"] < row["margin_high"]


def test_margins_are_paired():
    """Each sample is right in both or wrong in both: the difference has no spread."""
    row = _row(Bar("x", 1.0), _share(70), real=_share(70), reconstructed=_share(70))
    assert row["margin"] == row["margin_low"] == row["margin_high"] == 0.0
    assert row["verdict"] == "holds"
    crossed = _row(Bar("x", 1.0), _share(70), real=_share(70), reconstructed=_share(70)[::-1])
    assert crossed["margin_low"] < -0.1 and crossed["verdict"] == "holds, within noise"


def test_few_perfect_samples_prove_little():
    few, many = (_row(Bar("x"), [1.0] * n, real=[1.0] * n) for n in (9, 1000))
    assert few["verdict"] == "holds, within noise" and few["margin_low"] < -0.2
    loose = _row(Bar("x", 0.95), [1.0] * 1000, real=[1.0] * 1000)
    assert loose["verdict"] == "holds" and many["margin_low"] == pytest.approx(0, abs=0.01)


def test_decibels_are_below_the_reconstruction():
    model, through = [30.0, 28.0, 29.0], [31.0, 30.0, 30.5]
    tallies = {MODEL: _tally(psnr=model), REAL: _tally(psnr=[100.0] * 3)}
    tallies[RECONSTRUCTED] = _tally(psnr=through)
    (row,) = judge_bars("v2v", [Bar("psnr", 2.0, "decibels")], tallies)
    assert row["threshold"] == pytest.approx(28.5) and row["verdict"] == "holds"
    assert 0 <= row["margin_low"] < row["margin"] == pytest.approx(0.5)
    assert row["holds_against_real"] is None and row["tokenizer_keeps"] is None
    del tallies[RECONSTRUCTED]
    (row,) = judge_bars("v2v", [Bar("psnr", 2.0, "decibels")], tallies)
    assert row["holds"] is None and row["verdict"] == "not measured (no ceiling)"


def test_a_worse_tokenizer_does_not_ease_the_bar():
    kept = _row(Bar("x", 0.9), _share(90), real=_share(100), reconstructed=_share(95))
    lost = _row(Bar("x", 0.9), _share(90), real=_share(100), reconstructed=_share(94))
    assert kept["tokenizer_keeps"] is True and kept["holds"]
    assert lost["tokenizer_keeps"] is False and not lost["holds"] and lost["margin"] > 0
    assert lost["verdict"].startswith("does NOT hold: the tokenizer keeps less than 0.95")
    assert lost["holds_against_real"], "the model alone is good enough"
    value = _row(Bar("x", 0.9, "value"), _share(90), real=_share(100), reconstructed=_share(50))
    assert value["holds"] and value["tokenizer_keeps"] is None, "has no ceiling to ease"


def test_a_baseline_must_be_beaten():
    bar = Bar("x", kind="baseline", against="visible")
    assert str(bar) == "x > visible"
    assert _row(bar, _share(90), visible=_share(60))["verdict"] == "holds"
    same = _row(bar, _share(60), visible=_share(60))
    assert same["holds"] is False and same["margin_high"] == 0.0
    one_more = _row(bar, _share(61), visible=_share(60))
    assert one_more["verdict"] == "holds, within noise", "0 more is possible, and does not hold"


def test_every_sample_means_every_sample():
    bar = Bar("x", kind="every")
    row = _row(bar, [1.0] * 10)
    assert (row["bar"], row["verdict"]) == ("x in every sample", "holds")
    assert row["margin_low"] is None, "a count is not an estimate"
    assert _row(bar, _share(99))["verdict"] == "does NOT hold"


def test_another_score_of_the_model_as_the_measure():
    tallies = {MODEL: _tally(last=_share(94), first=_share(100))}
    bar = Bar("last", 0.95, "score", "first")
    assert judge_bars("long", [bar], tallies)[0]["verdict"] == "does NOT hold, within noise"
    tallies = {MODEL: _tally(last=_share(1), first=_share(0))}
    assert judge_bars("long", [bar], tallies)[0]["holds"] is False, "a share of nothing is nothing"


def test_a_score_that_no_sample_has_is_shown():
    (row,) = judge_bars("tv2v", [Bar("y", 0.9, "value")], {MODEL: _tally(x=[1.0])})
    assert (row["holds"], row["samples"], row["value"]) == (None, 0, None)
    assert row["verdict"] == "not measured (0 samples)"


def test_ceilings_have_intervals_too():
    tallies = {MODEL: _tally(x=_share(80)), REAL: _tally(x=[1.0] * 100)}
    tallies |= {RECONSTRUCTED: _tally(x=_share(95)), "visible": _tally(x=_share(50))}
    intervals = summary(tallies, {})["x"]["intervals"]
    assert set(intervals) == {REAL, RECONSTRUCTED, "visible"}
    assert intervals[REAL] == list(wilson_interval(1.0, 100))
    assert intervals[RECONSTRUCTED][0] < 0.95 < intervals[RECONSTRUCTED][1]
