"""Runs that LoadGen drives: its figures and its verdict beside ours."""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from nuwa.runtime.bench import driven, figures, loadgen, running
from nuwa.runtime.bench.observation import Observation
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent, Interrupted
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.errors import UnavailableError
from nuwa.spec.tasks import Task

NOWHERE = Target(None, None, IN_PROCESS, None, 1, None)


def asker(seconds: float, status: str = "ok"):
    def ask(number: int, scheduled: float) -> Observation:
        sent = time.perf_counter()
        time.sleep(seconds)
        return Observation(scheduled, sent, time.perf_counter(), status)

    return ask


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("mlperf_loadgen")
    return tmp_path / "logs"


ATTEMPTS = 3


def patiently(test):
    """Again if it fails: LoadGen's clock is its own, and between its process and ours a machine
    with other work takes longer, never less.
    """

    @functools.wraps(test)
    def again(*args, **options):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return test(*args, **options)
            except AssertionError:
                if attempt == ATTEMPTS:
                    raise

    return again


@patiently
def test_loadgen_agrees(folder):
    """Of the same requests: its 90th percentile beside ours."""
    sleeps = np.where(np.arange(4096) % 8 < 5, 0.02, 0.2)  # the median is not the percentile
    sleeps[31::32] = 0.6  # nor is the longest

    def ask(number: int, scheduled: float) -> Observation:
        return asker(sleeps[number])(number, scheduled)

    seen, verdict = loadgen.drive(ask, "single-stream", folder, seconds=5.0, least=64)
    ours = np.quantile([each.latency for each in seen], 0.9, method="inverted_cdf")
    assert verdict.figures["90.00 percentile latency"] == pytest.approx(ours, rel=0.3)
    assert verdict.valid and verdict.reasons == [] and len(seen) >= 64
    assert "Result is : VALID" in verdict.log
    ours = driven.judged(seen, Settings(extent=Extent(5.0, least=64)))
    assert ours["valid"]
    theirs = re.search(r"Early stopping 90.0th percentile estimate: (\d+)", verdict.log)
    assert ours["early_stopping_p90"] == pytest.approx(1e-9 * int(theirs[1]), rel=0.3)


def test_without_loadgen_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlperf_loadgen", None)
    with pytest.raises(UnavailableError, match=r"pip install 'nuwa-runtime\[bench\]'"):
        loadgen.drive(lambda number, due: None, "single-stream", tmp_path, seconds=1)


CASES = {
    "kept": (Settings("server", Extent(1.0), rate=100.0, bound=1.0, share=0.9), 0.005, True),
    "missed": (Settings("server", Extent(1.0), rate=100.0, bound=0.01, share=0.9), 0.03, False),
    "too few": (Settings("server", Extent(1.0), rate=10.0, bound=1.0, share=0.9), 0.005, False),
    "one by one": (Settings(extent=Extent(4.0)), 0.005, True),
    "one by one, too few": (Settings(extent=Extent(1.0)), 0.05, False),
    "several": (Settings("multi-stream", Extent(1.0), streams=2), 0.005, False),
}


@pytest.mark.parametrize("case", CASES)
@patiently
def test_both_verdicts_are_of_the_same_requests(case, folder):
    settings, seconds, valid = CASES[case]
    settings = replace(settings, loadgen=folder, outstanding=2)
    seen = running.run(asker(seconds), NOWHERE, settings, 0)
    told = seen.loadgen
    assert told["valid"] is valid, told
    assert told["ours"]["valid"] is valid and told["agree"], told
    assert bool(told["reasons"]) is bool(told["ours"]["reasons"]) is not valid
    assert bool(seen.notes) is not valid
    if not valid:
        assert told["reasons"][-1].rstrip(".") in seen.notes[0]
    if settings.scenario == "server":
        (point,) = seen.load
        assert point["best"] and point["rate"] == settings.rate
        assert point["achieved"] == pytest.approx(seen.rate)


@patiently
def test_offline_has_the_throughput_of_each_round(folder, monkeypatch):
    monkeypatch.setattr(driven, "GUESS_SECONDS", 0.3)
    settings = Settings("offline", Extent(1.0, rounds=4), outstanding=2, loadgen=folder)
    seen = running.run(asker(0.01), NOWHERE, settings, 0)
    assert len(seen.rates) == 4 and np.mean(seen.rates) == pytest.approx(seen.rate, rel=0.3)
    theirs = seen.loadgen["figures"]["Samples per second"]
    assert seen.rate == pytest.approx(theirs, rel=0.3)


def test_throughput_leaves_out_the_start_and_the_end_of_loadgen(tmp_path, monkeypatch):
    """Three requests, one a second, of a LoadGen that takes long to begin and to write its logs."""
    seen = [Observation(10.0 + i, 10.0 + i, 11.0 + i) for i in range(3)]

    def drive(*args, **named):
        time.sleep(0.3)
        if named["most"] == 3:
            raise Interrupted([seen])
        return seen, loadgen.Verdict(True, {}, "")

    monkeypatch.setattr(loadgen, "drive", drive)
    for most in (None, 3):
        settings = Settings(extent=Extent(1.0, most=most), loadgen=tmp_path, outstanding=1)
        told = running.run(asker(0.0), NOWHERE, settings, 0)
        assert told.seconds == 3.0 and told.interrupted is (most == 3)
        found = figures.metrics(told, Workload(Task.T2I), settings, figures.Surroundings())
        assert found["throughput"]["value"] == pytest.approx(1.0)


def test_loadgen_does_not_know_that_requests_were_refused(folder):
    settings = Settings("multi-stream", Extent(0.5, least=700), streams=4, loadgen=folder)
    seen = running.run(asker(0.001, "QUEUE_FULL"), NOWHERE, replace(settings, outstanding=1), 0)
    told = seen.loadgen
    assert told["valid"] and not told["ours"]["valid"] and not told["agree"]
    assert "QUEUE_FULL" in told["ours"]["reasons"][0]
    assert any("takes for valid" in note and "QUEUE_FULL" in note for note in seen.notes)


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "server", "offline"])
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_ends_loadgen_and_leaves_what_was_observed(scenario, folder):
    asked, lock = [], threading.Lock()

    def ask(number: int, scheduled: float) -> Observation:
        with lock:
            asked.append(number)
            if len(asked) == 10:
                os.kill(os.getpid(), signal.SIGINT)
        return asker(0.01)(number, scheduled)

    began = time.perf_counter()
    with pytest.raises(Interrupted) as ended:
        loadgen.drive(ask, scenario, folder, seconds=60.0, rate=50.0, streams=2, outstanding=2)
    assert time.perf_counter() - began < 30
    assert len(ended.value.rounds[0]) >= 3


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_does_not_wait_for_who_is_never_answered(folder):
    never = threading.Event()

    def ask(number: int, scheduled: float) -> Observation:
        with lock:
            asked.append(number)
            order = len(asked)
        if order == 10:
            os.kill(os.getpid(), signal.SIGINT)
        if order > 5:
            never.wait()
        return asker(0.0)(number, scheduled)

    asked, lock = [], threading.Lock()
    try:
        with pytest.raises(Interrupted) as ended:
            loadgen.drive(ask, "server", folder, seconds=60.0, rate=50.0)
    finally:
        never.set()
    assert 1 <= len(ended.value.rounds[0]) <= 5


SUMMARY = """\
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : Yes
  Early stopping satisfied: NO
Recommendations:
 * Reduce target QPS to improve latency.
Early Stopping Result:
 * Run unsuccessful.
 * Would need to run at least 970 more queries,
 with the run being successful if every additional
 query were under latency.

Min latency (ns)                : 30362231
"""


def test_the_reasons_are_those_of_its_summary():
    verdict = loadgen.read_verdict(SUMMARY)
    assert not verdict.valid and verdict.figures == {"Min latency": 0.030362231}
    assert verdict.reasons == [
        "Performance constraints satisfied: no",
        "Early stopping satisfied: no",
        "Reduce target QPS to improve latency.",
        "Run unsuccessful.",
        "Would need to run at least 970 more queries, with the run being successful if every "
        "additional query were under latency.",
    ]
