"""Comparing two results: verdicts on simulated machines that drift, and what is refused."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
from rich.console import Console

from nuwa.runtime.bench.compare import (
    LAUNCHES_APART,
    Difference,
    baseline_exit,
    check_comparable,
    compare,
    compare_results,
    differs,
    print_differences,
    to_json,
)
from nuwa.runtime.bench.judged import found_none, rate_kept, tails

REPETITIONS = 100


def rounds(
    random: np.random.Generator, speed: float = 1.0, count: int = 10, values: int = 30
) -> list[list[float]]:
    """Seconds: each round has a drift of 2 % of its own, and each value noise of 10 %."""
    drift = random.lognormal(sigma=0.02, size=(count, 1))
    return (0.05 * speed * drift * random.lognormal(sigma=0.1, size=(count, values))).tolist()


def verdicts(speed: float, seed: int, **size) -> list[Difference]:
    random = np.random.default_rng(seed)
    return [
        compare(rounds(random, **size), rounds(random, speed, **size)) for _ in range(REPETITIONS)
    ]


def result(values: list[list[float]], rates: list[list[float]] | None = None) -> dict:
    """Of `nuwa bench`."""
    return {
        "scenario": {"name": "single-stream", "seconds": 60.0},
        "workload": {"task": "t2v", "frames": 16, "prompts": ["a 3", "a 7"]},
        "model": {"name": "sprites", "digest": "aa"},
        "machine": {"cpu": {"name": "x", "cores": 2}},
        "metrics": {
            "latency": {"unit": "s", "better": "lower"},
            "throughput": {"unit": "1/s", "better": "higher"},
        },
        "rounds": {"latency": values, "throughput": rates or [[20.0], [20.2], [19.9]]},
    }


def test_two_runs_of_one_build_do_not_differ():
    found = verdicts(1.0, seed=0)
    assert sum(each.verdict == "no difference" for each in found) >= 95
    covered = sum(each.low <= 1 <= each.high for each in found)
    assert 90 <= covered <= 99  # the interval is one of 95 % despite the drift


def test_a_slow_down_of_a_tenth_is_found():
    found = verdicts(1.1, seed=1)
    assert sum(each.verdict == "slower" for each in found) >= 95
    assert 90 <= sum(each.low <= 1.1 <= each.high for each in found) <= 99
    assert np.median([each.ratio for each in found]) == pytest.approx(1.1, rel=0.01)


def test_a_speed_up_is_found():
    assert sum(each.verdict == "faster" for each in verdicts(1 / 1.1, seed=2)) >= 95


def test_five_rounds_of_twenty_values():
    same, slower = (verdicts(speed, 3, count=5, values=20) for speed in (1.0, 1.2))
    assert sum(each.verdict == "no difference" for each in same) >= 95
    assert sum(each.low <= 1 <= each.high for each in same) >= 90
    assert sum(each.verdict == "slower" for each in slower) >= 95


def test_values_of_one_round_do_not_stand_for_others():
    """Two rounds 10 % apart: a test of the pooled values would be sure of a difference."""
    random = np.random.default_rng(4)
    a = [(drift * random.lognormal(sigma=0.01, size=500)).tolist() for drift in (1.0, 1.1)]
    b = [(drift * random.lognormal(sigma=0.01, size=500)).tolist() for drift in (1.1, 1.2)]
    found = compare(a, b)
    assert found.verdict == "no difference" and found.low < 1 < found.ratio < found.high


def test_a_sure_difference_within_the_threshold_is_none():
    a = [[1.0, 1.001, 0.999]] * 5
    b = [[1.03, 1.031, 1.029]] * 5
    assert compare(a, b).verdict == "no difference"
    found = compare(a, b, threshold=0.02)
    assert (found.verdict, found.ratio) == ("slower", pytest.approx(1.03))
    assert compare(b, a, threshold=0.02).verdict == "faster"


def test_a_wide_interval_hides_a_large_ratio():
    assert compare([[1.0], [2.0], [0.5]], [[1.2], [2.4], [0.6]]).verdict == "no difference"


def test_rates_are_better_higher():
    a, b = [[20.0], [20.1], [19.9]], [[16.0], [16.1], [15.9]]
    found = compare(a, b, better="higher", unit="1/s")
    assert (found.verdict, found.ratio) == ("slower", pytest.approx(0.8, rel=1e-3))
    assert compare(b, a, better="higher").verdict == "faster"
    assert compare(a, b).verdict == "faster"


def test_a_and_b_are_mirrored():
    random = np.random.default_rng(5)
    a, b = rounds(random), rounds(random, 1.1)
    there, back = compare(a, b), compare(b, a)
    assert (back.ratio, back.low, back.high) == pytest.approx(
        (1 / there.ratio, 1 / there.high, 1 / there.low)
    )
    assert there.ratio == pytest.approx(there.b / there.a)


ALONE = "one launch each: builds may differ by a few percent for that alone"


def launched(random: np.random.Generator, speed: float, launches: int, apart: float) -> dict:
    """A result of so many launches, each with a speed of its own in all of its rounds."""
    size = {"count": 4, "values": 8} if launches > 1 else {}
    each = [rounds(random, speed * random.lognormal(sigma=apart), **size) for _ in range(launches)]
    kept = [{"rounds": {"latency": one}, "outcomes": {"ok": 9}} for one in each]
    return result(each[0]) | ({"each_launch": kept} if launches > 1 else {})


def latencies(
    random: np.random.Generator, speed: float, launches: tuple[int, int], apart: float
) -> list[Difference]:
    return [
        compare_results(
            launched(random, 1.0, launches[0], apart),
            launched(random, speed, launches[1], apart),
            threshold=0.0,
        )[0]
        for _ in range(REPETITIONS)
    ]


def test_one_launch_of_each_does_not_tell_what_is_of_launches():
    """Processes of one build, each some percent off in all of its rounds. By their rounds alone
    every other comparison would be sure of a difference.
    """
    random = np.random.default_rng(8)
    found = latencies(random, 1.0, (1, 1), LAUNCHES_APART)
    assert all(each.reason == ALONE for each in found)
    assert sum(each.verdict == "no difference" for each in found) >= 91
    sure = 0
    for _ in range(REPETITIONS):
        a, b = (launched(random, 1.0, 1, LAUNCHES_APART)["rounds"]["latency"] for _ in "ab")
        sure += compare(a, b, threshold=0.0).verdict != "no difference"
    assert sure >= 30
    slower = latencies(random, 1.2, (1, 1), LAUNCHES_APART)
    assert sum(each.verdict == "slower" for each in slower) >= 95


def test_a_launch_that_is_3_percent_off_is_no_sure_difference():
    a, b = ([[speed, 1.001 * speed, 0.999 * speed]] * 10 for speed in (1.0, 1.03))
    assert compare(a, b, threshold=0.0).verdict == "slower"
    found = compare_results(result(a), result(b), threshold=0.0)[0]
    assert (found.verdict, found.reason) == ("no difference", ALONE)
    assert found.ratio == pytest.approx(1.03)
    half = 1.96 * 2**0.5 * LAUNCHES_APART
    assert np.log([found.low, found.high]) - np.log(1.03) == pytest.approx([-half, half], rel=1e-3)


def test_several_launches_are_what_is_compared():
    """However far apart launches of this machine are, as they show it themselves."""
    random = np.random.default_rng(9)
    found = latencies(random, 1.0, (6, 6), 0.05)
    assert not any(each.reason for each in found)
    assert 90 <= sum(each.low <= 1 <= each.high for each in found) <= 99
    slower = latencies(random, 1.15, (6, 6), 0.05)
    assert sum(each.verdict == "slower" for each in slower) >= 95
    assert 90 <= sum(each.low <= 1.15 <= each.high for each in slower) <= 99
    mixed = latencies(random, 1.0, (6, 1), LAUNCHES_APART)
    assert mixed[0].reason == ALONE.replace("each", "of b")
    assert sum(each.verdict == "no difference" for each in mixed) >= 91
    both = latencies(random, 1.0, (1, 6), LAUNCHES_APART)
    assert both[0].reason == ALONE.replace("each", "of a")


def test_values_of_launches_are_means_of_their_rounds():
    a, b = result([[1.0], [1.0]]), result([[1.0], [1.0]])
    a["each_launch"] = [{"rounds": {"latency": [[0.5], [2.0]]}}, {"rounds": {"latency": [[1.0]]}}]
    b["each_launch"] = [{"rounds": {"latency": [[2.0], [8.0, None]]}}, {"rounds": {}}, {}]
    b["each_launch"].append({"rounds": {"latency": [[1.0], []]}})
    found = compare_results(a, b)[0]
    assert (found.a, found.b, found.ratio) == pytest.approx((1.0, 2.0, 2.0))
    assert compare_results(a, b)[1].reason == ALONE, "throughput has no launches"


def tailed(slow: float, count: int = 6, values: int = 40) -> list[list[float]]:
    """Rounds of which a fifth is slow, and the rest takes a second."""
    return [[slow if at % 5 == 0 else 1.0 for at in range(values)] for _ in range(count)]


def test_a_longer_tail_is_slower_although_medians_are_the_same():
    a, b = result(tailed(1.5)), result(tailed(3.0))
    latency, _, tail = compare_results(a, b)
    assert latency.verdict == "no difference" and latency.ratio == 1.0
    assert (tail.verdict, tail.a, tail.b) == ("slower", pytest.approx(1.5), pytest.approx(3.0))
    assert tail.reason == ALONE and baseline_exit(compare_results(a, b)) == 1
    assert compare_results(b, a)[2].verdict == "faster"
    for each in (a, b):
        each["scenario"]["name"] = "multi-stream"
    assert compare_results(a, b)[2].name == "latency p99"
    assert compare_results(a, b)[2].reason == "0 of at least 2 rounds of 368 requests each"
    turns = [result(tailed(slow, 8)) | {"turns": {"id": "x"}} for slow in (1.5, 3.0)]
    assert compare_results(*turns)[2].verdict == "slower"
    near = [result(tailed(slow, 8)) | {"turns": {"id": "x"}} for slow in (1.5, 1.6)]
    assert compare_results(*near)[2].verdict == "no difference", "of tails the threshold is twice"
    launches = [
        result(tailed(1.5, 1)) | {"each_launch": [{"rounds": {"latency": tailed(slow, 1)}}] * 3}
        for slow in (1.5, 3.0)
    ]
    tail = compare_results(*launches)[2]
    assert (tail.verdict, tail.reason) == ("slower", "")


def test_neighbouring_rounds_together_have_enough_values_for_a_tail():
    few = [[float(number)] * 12 for number in range(1, 9)]
    assert tails(0.9, few) == [[[3.0], [8.0]]], "three, and five with those that are left"
    assert tails(0.9, few, [*few[:3], [None] * 30, *few[4:]]) == [[[3.0], [8.0]]] * 2
    assert tails(0.9, few[:2]) == [[]]


def served(met: bool | None, **scenario) -> dict:
    made = result([[1.0], [1.0]])
    rate = {"name": "server", "rate": 4.0, "slo_seconds": 1.0, "slo_quantile": "0.9"}
    made["scenario"] = made["scenario"] | rate | scenario
    return made | {"load": [{"rate": 4.0, "met": met}]}


def test_a_bound_that_is_missed_is_slower_whatever_medians_say():
    latency, _, tail, kept = compare_results(served(True), served(False))
    assert latency.verdict == "no difference" and tail.name == "latency p90"
    assert (kept.name, kept.verdict, kept.a, kept.b) == ("bound kept", "slower", 1.0, 0.0)
    assert kept.reason == "kept in a, missed in b" and baseline_exit([latency, kept]) == 1
    assert compare_results(served(False), served(True))[3].verdict == "faster"
    same = compare_results(served(False), served(False))[3]
    assert (same.verdict, same.reason) == ("no difference", "missed in both")
    unknown = compare_results(served(True), served(None))[3]
    assert (unknown.verdict, unknown.reason) == ("unknown", "kept in a, undecided in b")
    launches = served(True) | {"each_launch": [{"load": [{"met": met}]} for met in (True, False)]}
    assert rate_kept(launches) is False
    assert rate_kept(served(True)) is True and rate_kept(served(False, rate=None)) is None


def test_a_result_that_does_not_say_its_quantile_is_of_p99():
    old, new = served(True), served(True, slo_quantile="0.99")
    del old["scenario"]["slo_quantile"]
    assert compare_results(old, new)[2].name == "latency p99"
    with pytest.raises(ValueError, match="scenario.slo_quantile: 0.99, 0.9"):
        compare_results(old, served(True))


def test_what_cannot_be_told():
    one = compare([[1.0, 2.0]], [[1.0], [2.0], [3.0]])
    assert (one.verdict, one.reason, one.ratio) == ("unknown", "1 of at least 2 rounds", None)
    zero = compare([[0.0], [0.0]], [[1.0], [1.0]])
    assert (zero.verdict, zero.reason) == ("unknown", "a median is not above 0")
    assert compare([[], [None], [1.0]], [[1.0], [1.0]]).verdict == "unknown"
    assert compare([[1.0, None], [1.0], []], [[1.0], [1.0]]).verdict == "no difference"


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="threshold of -0.1"):
        compare([[1.0]] * 2, [[1.0]] * 2, threshold=-0.1)
    with pytest.raises(ValueError, match="'more': lower or higher"):
        compare([[1.0]] * 2, [[1.0]] * 2, better="more")
    with pytest.raises(ValueError, match="confidence of 1"):
        compare([[1.0], [2.0]], [[1.0], [2.0]], confidence=1)


def test_two_results():
    random = np.random.default_rng(6)
    a = result(rounds(random))
    b = result(rounds(random, 1.2), [[30.0], [30.1], [29.8]])
    latency, throughput, tail = compare_results(a, b)
    assert (tail.name, tail.unit, tail.verdict) == ("latency p90", "s", "slower")
    assert (latency.name, latency.unit, latency.verdict) == ("latency", "s", "slower")
    assert (throughput.name, throughput.unit, throughput.verdict) == ("throughput", "1/s", "faster")
    assert baseline_exit([latency, throughput]) == 1
    assert baseline_exit([throughput]) == baseline_exit(compare_results(a, a)) == 0
    assert compare_results(a, b, threshold=1.0)[0].verdict == "no difference"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("scenario", "name"), "offline", "scenario.name: single-stream, offline"),
        (("scenario", "streams"), 8, "scenario.streams: none, 8"),
        (("workload", "task"), "t2i", "workload.task: t2v, t2i"),
        (("workload", "frames"), 8, "workload.frames: 16, 8"),
        (("workload", "prompts"), ["a 3"], "workload.prompts"),
        (("task",), "t2i", "task: none, t2i"),
        (("metrics", "latency", "unit"), "ms", "metrics.latency.unit: s, ms"),
        (("metrics", "latency", "better"), "higher", "metrics.latency.better: lower, higher"),
    ],
)
def test_results_that_are_not_comparable(path, value, named):
    a = result([[1.0], [1.0]])
    b = copy.deepcopy(a)
    part = b
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=named):
        compare_results(a, b)


def test_results_without_a_metric_in_common():
    a, b = result([[1.0], [1.0]]), result([[1.0], [1.0]])
    b["rounds"] = {}
    with pytest.raises(ValueError, match="no metric has rounds in both"):
        compare_results(a, b)


def test_what_may_differ_is_listed():
    a, b = result([[1.0], [1.0]]), result([[1.0], [1.0]])
    assert differs(a, b) == []
    b["model"]["digest"], b["machine"]["cpu"]["cores"] = "bb", 4
    b["version"], b["scenario"]["seconds"] = "0.2", 30.0
    b["workload"]["threads"] = 4
    del b["rounds"]["throughput"]
    assert [each.name for each in compare_results(a, b)] == ["latency", "latency p90"]
    assert differs(a, b) == [
        "version: none, 0.2",
        "model.digest: aa, bb",
        "machine.cpu.cores: 2, 4",
        "scenario.seconds: 60.0, 30.0",
        "workload.threads: none, 4",
        "metrics.throughput: in one of them only",
    ]


def test_differences_are_printed():
    a, b = result([[0.5], [0.5]]), result([[0.75], [0.75]], [[20.0]])
    output = io.StringIO()
    console = Console(file=output, width=160)
    print_differences(compare_results(a, b), ["model.digest: aa, bb"], console)
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert f"latency 500 ms 750 ms 1.500 1.400 .. 1.608 slower: {ALONE}" in lines
    assert "throughput – – – unknown: 1 of at least 2 rounds" in lines
    assert "differs: model.digest: aa, bb" in lines


def searched(low: float | None, high: float | None, decided: bool = True) -> dict:
    """A result of a search for the highest rate; without an interval, one of earlier versions."""
    best = {"highest_rate": {"unit": "1/s", "better": "higher", "value": low}} if low else {}
    return {
        "scenario": {"name": "server", "rate": None, "seconds": 60.0, "slo_seconds": 1.0},
        "workload": {"task": "t2i"},
        "metrics": {"latency": {"unit": "s"}, **best},
        "rounds": {},
        "search": {"low": low, "high": high, "decided": decided},
        "outcomes": {"ok": 9},
    }


def searches(a: dict, b: dict, threshold: float = 0.05) -> Difference:
    rate, failures = compare_results(a, b, threshold)
    assert (rate.name, failures.verdict) == ("highest_rate", "no difference")
    return rate


def test_searches_differ_if_their_intervals_are_apart():
    a = searched(5.0, 5.15)
    assert searches(a, a).verdict == "no difference"
    assert searches(a, searched(4.8, 4.94)).verdict == "no difference", "within the threshold"
    found = searches(a, searched(4.5, 4.64))
    assert (found.verdict, found.ratio) == ("slower", 0.9)
    assert (found.low, found.high) == (4.5 / 5.15, 4.64 / 5.0)
    assert searches(searched(4.5, 4.64), a).verdict == "faster"
    assert searches(a, searched(4.5, 4.64), threshold=0.1).verdict == "no difference"
    assert baseline_exit([found]) == 1


def test_a_search_that_was_not_decided_says_less():
    a = searched(5.0, 5.15)
    wide = searches(a, searched(4.0, 6.0, decided=False))
    assert (wide.verdict, wide.reason) == ("unknown", "the search of b is undecided")
    assert baseline_exit([wide]) == 1
    assert searches(a, searched(1.0, 4.0, decided=False)).verdict == "slower", "all the same"
    endless = searched(8.0, None, decided=False)
    assert searches(a, endless).verdict == "faster"
    assert searches(endless, endless).verdict == "unknown"


def test_it_is_known_of_a_search_that_it_found_no_rate():
    assert found_none(searched(None, 0.5)) and not found_none(searched(5.0, None))
    stopped = {"scenario": {"name": "server"}, "load": []}  # before there was a search to tell of
    assert found_none(stopped)
    assert not found_none({"scenario": {"name": "server", "rate": 2.0}})
    assert not found_none({"scenario": {"name": "offline"}})


def test_a_search_that_found_no_rate_is_slower_than_one_that_did():
    a, none = searched(5.0, 5.15), searched(None, 0.5, decided=False)
    found = searches(a, none)
    assert (found.verdict, found.reason) == ("slower", "no rate kept the bound in b")
    assert (found.a, found.b, found.ratio) == (5.0, None, None)
    assert searches(none, a).verdict == "faster"
    assert searches(none, none).verdict == "unknown"
    earlier = searched(None, None) | {"load": [{"rate": 0.5, "met": False}]}
    del earlier["search"]
    assert searches(a, earlier).verdict == "slower"


def test_searches_must_have_looked_for_as_long():
    a, b = searched(5.0, 5.15), searched(5.0, 5.15)
    b["scenario"]["seconds"] = 30.0
    with pytest.raises(ValueError, match="scenario.seconds: 60.0, 30.0"):
        compare_results(a, b)
    for each in (a, b):
        each["scenario"]["rate"], each["rounds"] = 4.0, {"latency": [[1.0], [1.0]]}
    assert compare_results(a, b)[0].name == "latency", "at a given rate it may be longer"


def loaded(value: float, outstanding: int = 8, slots: int | None = 4) -> dict:
    """Of LoadGen's offline scenario, which has no rounds."""
    return {
        "scenario": {"name": "offline", "driven_by": "LoadGen", "outstanding": outstanding},
        "workload": {"task": "t2i", "slots": slots},
        "metrics": {"throughput": {"unit": "1/s", "better": "higher", "value": value}},
        "rounds": {"throughput": []},
        "outcomes": {"ok": 9},
    }


def test_offline_without_rounds_is_compared_by_its_throughput():
    a = loaded(10.0)
    found, _ = compare_results(a, a)
    assert (found.name, found.verdict, found.ratio) == ("throughput", "no difference", 1.0)
    assert compare_results(a, loaded(9.0))[0].verdict == "slower"
    assert compare_results(a, loaded(11.0))[0].verdict == "faster"
    assert compare_results(loaded(0.0), a)[0].verdict == "unknown"


def test_requests_under_way_may_differ_as_far_as_slots_say_it():
    assert compare_results(loaded(10.0, 8, 4), loaded(20.0, 16, 8))[0].verdict == "faster"
    assert compare_results(loaded(10.0, 8, None), loaded(10.0, 8, 4))
    with pytest.raises(ValueError, match="scenario.outstanding: 8, 32"):
        compare_results(loaded(10.0, 8, 4), loaded(10.0, 32, 4))


def test_what_must_be_the_same_is_known_before_measuring():
    a = result([[1.0], [1.0]])
    conditions = {"scenario": dict(a["scenario"]), "workload": dict(a["workload"])}
    check_comparable(a, conditions)
    conditions["workload"]["given_frames"] = 0
    check_comparable(a, conditions)  # results of earlier versions do not say it
    conditions["workload"]["frames"] = 8
    with pytest.raises(ValueError, match="workload.frames: 16, 8"):
        check_comparable(a, conditions)


def test_another_export_of_the_same_is_no_other_bundle():
    a, b = result([[1.0], [1.0]]), result([[1.0], [1.0]])
    a["model"] = {"bundle_hash": "aa", "contents_hash": "cc"}
    b["model"] = {"bundle_hash": "bb", "contents_hash": "cc"}
    assert differs(a, b) == []
    b["model"]["contents_hash"] = "dd"
    assert differs(a, b) == [
        "model.bundle_hash: aa, bb",
        "model.contents_hash: cc, dd",
        "model.evaluation: not known of both, so what is faster may be worse",
    ]
    a["model"]["evaluation"] = {"t2v joint": 0.95}
    b["model"]["evaluation"] = {"t2v joint": 0.71}
    assert differs(a, b)[-1] == "model.evaluation.t2v joint: 0.95, 0.71"


def test_a_comparison_as_json():
    a, b = result([[0.5], [0.5]]), result([[0.75], [0.75]])
    told = to_json(compare_results(a, b), ["model.digest: aa, bb"], 0.05)
    assert json.loads(json.dumps(told)) == told
    assert (told["schema"], told["threshold"]) == ("nuwa-bench-compare/1", 0.05)
    assert told["differences"][0]["verdict"] == "slower"
    assert told["differs"] == ["model.digest: aa, bb"]
