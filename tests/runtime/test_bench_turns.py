"""Runs that take turns: whose round is when, and what is compared then."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nuwa.runtime.bench import compare, measure, scenarios, schema, statistics
from nuwa.runtime.bench.observation import Observation
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent, Interrupted
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.turns import Following, Leading, Turns
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.cli import main
from nuwa.runtime.client import LocalClient
from nuwa.runtime.commands import bench_against
from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from . import virtual_time
from .fake_engine import FakeEngine
from .messages import wait_until

FOLLOWER = """
import sys
from pathlib import Path
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.turns import Following

turns, log = Following(sys.argv[1]), Path(sys.argv[2])
turns.begin()
try:
    for _ in turns.rounds(Extent(60.0, rounds=int(sys.argv[3]))):
        with log.open("a") as file:
            file.write("b")
except KeyboardInterrupt:
    with log.open("a") as file:
        file.write("!")
turns.finish()
with log.open("a") as file:
    file.write(".")
"""


def leading(log: Path, rounds: int) -> Leading:
    return Leading(lambda word: [sys.executable, "-c", FOLLOWER, word, str(log), str(rounds)])


def write(log: Path, what: str) -> None:
    with log.open("a") as file:
        file.write(what)


def test_each_goes_first_in_half_of_the_pairs(tmp_path):
    log = tmp_path / "log"
    turns = leading(log, 6)
    turns.begin()
    for _ in turns.rounds(Extent(60.0, rounds=6)):
        write(log, "a")
    write(log, "-")
    turns.end()
    assert log.read_text() == "abababbababa-.", "the other one does nothing before all is over"
    assert turns.waited > 0


def test_slow_rounds_are_fewer(tmp_path):
    """As soon as there are enough pairs and the time is over; the other one has as many."""
    log = tmp_path / "log"
    turns = leading(log, 50)
    turns.begin()
    for _ in turns.rounds(Extent(0.3, rounds=50)):
        time.sleep(0.1)
        write(log, "a")
    turns.end()
    assert log.read_text() == "ab" * 6 + "."


def test_who_loses_the_other_goes_on_alone(tmp_path):
    log = tmp_path / "log"
    turns = leading(log, 6)
    turns.begin()
    for number, _ in enumerate(turns.rounds(Extent(60.0, rounds=6))):
        if number == 2:
            turns._process.kill()
        write(log, "a")
    turns.end()
    assert log.read_text() == "ababaaaa"


def test_who_has_more_rounds_than_the_other_goes_on_alone(tmp_path):
    log = tmp_path / "log"
    turns = leading(log, 2)
    turns.begin()
    for _ in turns.rounds(Extent(60.0, rounds=6)):
        write(log, "a")
    turns.end()
    assert log.read_text().replace(".", "") == "ababaaaa", "the other one ends meanwhile"


def test_the_other_ends_with_who_leads(tmp_path):
    log = tmp_path / "log"
    turns = leading(log, 5)
    turns.begin()
    with pytest.raises(KeyboardInterrupt):
        for _ in turns.rounds(Extent(60.0, rounds=5)):
            raise KeyboardInterrupt
    turns.end()
    assert log.read_text() == "!.", "it was told that this is all"


def test_who_does_not_begin_is_told_of():
    turns = Leading(lambda word: [sys.executable, "-c", ""])
    with pytest.raises(ValueError, match="ended before it began"):
        turns.begin()
    turns.end()
    with pytest.raises(ValueError, match="turns 'x': not what"):
        Following("x")


class Sharing(Turns):
    """The other one's rounds take `seconds`."""

    id = "shared"

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.taken_at = seconds, []

    def rounds(self, extent):
        for each in extent.each():
            with self._waiting():
                time.sleep(self.seconds)
            self.taken_at.append(time.perf_counter())
            yield each


def takes(seconds: float):
    def ask(number: int, scheduled: float) -> Observation:
        sent = time.perf_counter()
        time.sleep(seconds)
        return Observation(scheduled, sent, time.perf_counter())

    return ask


@pytest.fixture
def virtual(monkeypatch):
    with virtual_time.passing(monkeypatch) as time_that_passes:
        yield time_that_passes


@pytest.mark.usefixtures("virtual")
def test_throughput_is_of_ones_own_rounds():
    turns = Sharing(100.0)
    found = scenarios.offline_in_turns(takes(0.5), Extent(40.0, rounds=4), 2, turns)
    assert found.rates == pytest.approx([4.0] * 4) and found.rate == pytest.approx(4.0)
    assert len(found.rounds) == 4 and min(map(len, found.rounds)) >= 38
    assert np.diff(turns.taken_at).min() > 100


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("length", [0.5, 0.72, 0.74, 1.5])
def test_throughput_of_batches_does_not_depend_on_where_they_end(length):
    """Eight at a time, which all take as long."""
    found = scenarios.offline_in_turns(takes(length), Extent(9.0, rounds=3), 8, Sharing(1.0))
    assert found.rates == pytest.approx([8 / length] * 3)


def test_ctrl_c_leaves_the_rounds_until_then(monkeypatch):
    asked = itertools.count()

    def ask(number: int, scheduled: float) -> Observation:
        if next(asked) == 7:
            raise KeyboardInterrupt
        return Observation(scheduled, scheduled, time.perf_counter())

    extent = Extent(60.0, rounds=6, least=1, most=24)
    with pytest.raises(Interrupted) as ended:
        scenarios.single_stream(ask, extent, turns=Sharing(0.0))
    assert list(map(len, ended.value.rounds)) == [4, 3]
    join, joined = threading.Thread.join, itertools.count()

    def interrupted(thread, timeout=None):
        if thread.name == "nuwa-bench" and next(joined) == 2:
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(Interrupted) as ended:
        scenarios.offline_in_turns(takes(0.01), Extent(0.6, rounds=6), 1, Sharing(0.0))
    assert len(ended.value.throughput.rates) in (2, 3), "the third may have had no answer yet"


def test_ctrl_c_between_rounds():
    class Ended(Sharing):
        def rounds(self, extent):
            yield from itertools.islice(super().rounds(extent), 2)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as ended:
        scenarios.offline_in_turns(takes(0.001), Extent(0.2, rounds=6), 1, Ended(0.0))
    assert len(ended.value.throughput.rates) == 2


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "offline"])
def test_figures_are_of_ones_own_time(scenario):
    engine = FakeEngine()
    step = engine.step
    engine.step = lambda: time.sleep(0.1) or step()
    settings = Settings(
        scenario,
        Extent(16.0, rounds=8),
        streams=1,
        outstanding=3,
        warm_up=1,
        turns=Sharing(60.0),
    )
    with LocalClient(engine) as client:
        target = Target(client, engine.info, IN_PROCESS, None, engine.slots, None)
        result = measure.measure(target, Workload(Task.T2I), settings)
    assert result["turns"] == {"id": "shared"}
    assert result["metrics"]["throughput"]["value"] == pytest.approx(2.5, rel=0.01)
    assert len(result["rounds"]["throughput" if scenario == "offline" else "latency"]) == 8
    assert result["power"]["energy"] == [] and "others_share" not in result["conditions"]
    if scenario == "single-stream":
        assert result["metrics"]["measuring"]["value"] < 0.01


def test_what_takes_no_turns(tmp_path):
    with pytest.raises(ValueError, match="server scenario takes no turns"):
        Settings("server", bound=1.0, rate=1.0, turns=Sharing(0.0))
    for extent in (Extent(1.0, rounds=5), Extent(1.0, rounds=9, most=5)):
        with pytest.raises(ValueError, match="takes 6 rounds and queries at the least"):
            Settings(extent=extent, turns=Sharing(0.0))
    with pytest.raises(ValueError, match="LoadGen takes no turns"):
        Settings(loadgen=tmp_path, turns=Sharing(0.0))


def drifting(draw: random.Random, rounds: int, slower: float):
    """Rounds of two runs on a machine whose speed wanders, and which now and then is far slower."""
    speed, found = 1.0, ([], [])
    for _ in range(rounds):
        for series, factor in zip(found, (1.0, slower), strict=True):
            speed *= draw.gauss(1.0, 0.02)
            burst = 2.0 if draw.random() < 0.1 else 1.0
            series.append([speed * factor * burst * draw.gauss(1.0, 0.02) for _ in range(5)])
    return found


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "no difference"), (1.1, "slower")])
def test_pairs_tell_apart_what_a_drifting_machine_hides(slower, verdict):
    draw, told, unpaired = random.Random(1), [], []
    for _ in range(40):
        a, b = drifting(draw, 30, slower)
        told.append(compare.compare(a, b, paired=True).verdict)
        unpaired.append(compare.compare(a, b).verdict)
    assert told.count(verdict) >= 38
    if slower > 1:
        assert unpaired.count(verdict) < 30, "which would be as good without taking turns"


def test_what_has_no_partner_is_passed_over():
    a = [[1.0], [], [3.0], [1.0], [2.0], [1.0], [1.5], [9.0]]
    b = [[2.0], [5.0], [6.0], [2.0], [4.0], [2.0], [3.0]]
    found = compare.compare(a, b, paired=True)
    assert found.ratio == pytest.approx(2.0) and found.verdict == "slower"
    few = compare.compare(a[:6], b[:6], paired=True)
    assert few.verdict == "unknown" and few.reason == "5 of at least 6 pairs of rounds"


def test_only_results_of_one_pair_are_compared_in_pairs():
    def result(values, turns):
        told = {"turns": {"id": turns}} if turns else {}
        metrics = {"latency": {"unit": "s", "better": "lower", "mean": 1.0}}
        return {"metrics": metrics, "rounds": {"latency": [[each] for each in values]}, **told}

    wide = [2.0**power for power in range(-5, 5)]
    more = [1.2 * each for each in wide]
    for turns, verdict in (
        (("x", "x"), "slower"),
        (("x", "y"), "no difference"),
        (("", ""), "no difference"),
    ):
        a, b = result(wide, turns[0]), result(more, turns[1])
        assert compare.took_turns(a, b) is (verdict == "slower")
        assert compare.compare_results(a, b)[0].verdict == verdict


def test_the_signed_rank_interval_is_that_of_all_signs():
    """Its ends are the outermost means of pairs that a test of so many ranks does not refuse."""
    values = [1.1, -0.4, 2.0, 0.7, 3.1, 0.2, 1.6]
    middle, low, high = statistics.signed_rank_interval(values)
    count = len(values)
    sums = sorted(
        sum(rank for rank, sign in zip(range(1, count + 1), signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=count)
    )

    def refused(centre: float) -> bool:
        ranked = sorted((each - centre for each in values), key=abs)
        above = sum(rank for rank, each in enumerate(ranked, 1) if each > 0)
        total = count * (count + 1) // 2
        fewer = sum(each <= min(above, total - above) for each in sums) / len(sums)
        return 2 * fewer <= 0.05

    assert refused(low - 1e-9) and not refused(low + 1e-9)
    assert refused(high + 1e-9) and not refused(high - 1e-9)
    assert low < middle < high
    assert statistics.signed_rank_interval(values[:5]) is None
    assert statistics.signed_rank_needed() == 6


@pytest.mark.parametrize("count", [12, statistics.EXACT_RANKS, 200])
def test_the_signed_rank_interval_covers(count):
    draws = np.random.default_rng(3).standard_t(2, (600, count))
    ends = [statistics.signed_rank_interval(each) for each in draws]
    covered = np.mean([low <= 0 <= high for _, low, high in ends])
    assert 0.93 < covered < 0.98


def words_of(words: str, against: str, server: str | None = None):
    args = SimpleNamespace(words=words.split(), against=against, server=server)
    vars(args).update(seconds=3.0, rounds=9, slots=1, queue_size=4, queries=None)
    program, told = bench_against.other_command(args)
    always = told.index("--seconds")
    expected = ["--queue-size", "4", "--slots", "1", "--rounds", "9", "--seconds", "3.0"]
    assert told[always - 6 : always + 2] == expected
    return program, told[: always - 6], told[always + 2 :]


def test_the_other_is_told_the_same_but_for_what_it_measures(tmp_path):
    """With what are the defaults of this version."""
    python = [sys.executable, "-m", "nuwa.runtime"]
    folder = str(tmp_path)
    told = f"--prompt b --task t2i b --against {folder} --out o --scores s --seconds=3"
    found = python, ["--instead", folder], ["--prompt", "b", "--task", "t2i", "b", "--seconds=3"]
    assert words_of(told, folder) == found
    told = "--server h:1 b --against g:2 --metrics h:3 --model m --tls"
    found = python, ["--instead", "g:2"], ["--server", "h:1", "b", "--model", "m", "--tls"]
    assert words_of(told, "g:2", "h:1") == found
    told = f"b --against={sys.executable} --task t2v"
    assert words_of(told, sys.executable) == ([sys.executable], [], ["b", "--task", "t2v"])
    for nothing in ("nothing", ""):
        with pytest.raises(ValueError, match="neither a bundle's folder nor a program"):
            words_of("b", nothing)


def test_the_other_measures_what_it_was_told_to():
    args = SimpleNamespace(bundle=["b"], server=None, preset="base", precision="fp16", instead="x")
    bench_against.replace(args)
    assert (args.bundle, args.server, args.preset, args.precision) == (["x"], None, None, None)
    args = SimpleNamespace(bundle=["b"], server="h:1", preset=None, precision=None, instead="g:2")
    bench_against.replace(args)
    assert (args.bundle, args.server) == ([], "g:2")


def slow(seconds: float) -> FakeEngine:
    engine = FakeEngine()
    step = engine.step
    engine.step = lambda: time.sleep(seconds) or step()
    return engine


SHORT = ["--task", "t2i", "--seconds", "2.4", "--rounds", "12"]


def test_two_servers_in_turns(tmp_path, capsys):
    with Server(slow(0.005), queue_size=8) as a, Server(slow(0.05), queue_size=8) as b:
        words = ["--server", b.address, "--against", a.address, *SHORT, "--out", str(tmp_path)]
        status = main(["bench", *words])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 1, "this one is slower"
    (latency, failed) = last["comparison"]["differences"]
    assert latency["verdict"] == "slower" and latency["ratio"] > 1.05
    assert failed["verdict"] == "no difference"
    written = schema.read(tmp_path / "result.json"), schema.read(tmp_path / "against/result.json")
    assert compare.took_turns(*written) and last["turns"] == written[1]["turns"]
    assert written[1]["workload"]["target"] == f"gRPC {a.address}"
    assert [len(each["rounds"]["latency"]) for each in written] == [12, 12]


def test_ctrl_c_compares_what_there_is(tmp_path):
    with Server(slow(0.005), queue_size=8) as a, Server(slow(0.05), queue_size=8) as b:
        words = ["--server", b.address, "--against", a.address, "--task", "t2i"]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "nuwa.runtime",
                "bench",
                *words,
                "--seconds",
                "600",
                "--rounds",
                "6000",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as at a terminal both of them hear it
        )
        try:
            while process.stderr.readline().strip() != "single-stream":
                assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            wait_until(lambda: len(a.host.loaded[0].engine.admitted) > 80, 60)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    last = json.loads(out.splitlines()[-1])
    assert last["interrupted"] and last["comparison"]["differences"][0]["verdict"] == "slower"


def test_if_the_other_ends_it_is_told(tmp_path, capsys, server):
    words = ["bench", "--server", server.address, *SHORT]
    assert main([*words, "--against", "127.0.0.1:1"]) == 2
    assert "ended before it began" in capsys.readouterr().err
    assert main([*words, "--against", "127.0.0.1:1", "--loadgen", str(tmp_path)]) == 2
    assert "LoadGen takes no turns" in capsys.readouterr().err
    for other in (["--baseline", "x"], ["--compare", "x", "y"]):
        assert main([*words, "--against", "127.0.0.1:1", *other]) == 2
        assert "--against compares by itself" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "b"), *SHORT, "--against", "none-such"]) == 2
    assert "neither a bundle's folder nor a program" in capsys.readouterr().err


def test_without_the_others_result_nothing_is_lost(tmp_path, capsys, server):
    """It does its rounds, and dies before it writes."""
    program = tmp_path / "nuwa-of-before"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nfrom nuwa.runtime.bench import schema\n"
        "from nuwa.runtime.cli import main\nschema.write = lambda *_: os._exit(3)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    words = ["--server", server.address, "--against", server.address, *SHORT]
    args = ["bench", *words, "--out", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_against, "PYTHON", [str(program)])
        assert main(args) == 1
    printed = capsys.readouterr()
    assert "not compared: the other run (--against) has no result" in printed.err
    last = json.loads(printed.out.splitlines()[-1])
    assert last["outcomes"]["ok"] and last["comparison"]["status"] == 1
    assert schema.read(tmp_path / "out" / "result.json")["outcomes"] == last["outcomes"]
