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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nuwa.runtime.bench import compare, measure, scenarios, schema, statistics
from nuwa.runtime.bench.launches import compare_launches, together
from nuwa.runtime.bench.observation import Observation
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent, Interrupted
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.turns import Following, Run, Turns, take_turns
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.cli import main
from nuwa.runtime.client import LocalClient
from nuwa.runtime.commands import bench_against
from nuwa.runtime.commands.bench_against import Side
from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from . import virtual_time
from .fake_engine import FakeEngine
from .messages import wait_until

FOLLOWER = """
import sys
import time
from pathlib import Path
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.turns import Following

turns, name, log = Following(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
def write(what):
    with log.open("a") as file:
        file.write(what)

turns.begin()
try:
    for _ in turns.rounds(Extent(60.0, rounds=int(sys.argv[4]))):
        time.sleep(float(sys.argv[5]))
        write(name)
except KeyboardInterrupt:
    write("!")
turns.finish()
write(".")
assert turns.waited > 0
"""


class Two:
    """Runs a and b, which write into one log what they do. rounds: that each has at the most."""

    def __init__(self, folder: Path, *rounds: int, takes: float = 0.0) -> None:
        self.log = folder / "log"
        self.runs = []
        for name, most in zip("ab", rounds, strict=True):
            words = [name, str(self.log), str(most), str(takes)]
            command = [sys.executable, "-c", FOLLOWER]
            with (folder / name).open("w") as said:
                run = Run(lambda word, c=command, w=words: [*c, word, *w], "id", said)
            assert run.warmed()
            self.runs.append(run)

    def take_turns(self, extent: Extent) -> tuple[int, str]:
        """How many pairs, and what was done."""
        pairs = take_turns(extent, self.runs)
        self.statuses = [run.end() for run in self.runs]
        return pairs, self.log.read_text()


def test_each_goes_first_in_half_of_the_pairs(tmp_path):
    two = Two(tmp_path, 6, 6)
    pairs, done = two.take_turns(Extent(60.0, rounds=6))
    assert (pairs, done) == (6, "abababbababa..")
    assert two.statuses == [0, 0]


def test_slow_rounds_are_fewer(tmp_path):
    """As soon as there are enough pairs and the time of both is over; and still each goes first in
    half of them.
    """
    two = Two(tmp_path, 50, 50, takes=0.1)
    assert two.take_turns(Extent(0.3, rounds=50)) == (6, "ababab" + "bababa" + "..")


def test_who_goes_first_changes_when_half_of_the_time_is_over():
    """Pairs of two seconds, of as many rounds as would take ten times as long as there is."""
    now, led = [0.0], []

    class Takes:
        def __init__(self, name: str) -> None:
            self.name = name

        def round(self) -> bool:
            now[0] += 1.0
            led.append(self.name)
            return True

        def over(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        pairs = take_turns(Extent(10.0, rounds=100), [Takes("a"), Takes("b")])
    firsts = led[::2]
    assert pairs == 11 and firsts == ["a"] * 6 + ["b"] * 5


def test_who_was_asked_for_queries_has_all_of_its_rounds(tmp_path):
    two = Two(tmp_path, 9, 9, takes=0.05)
    assert two.take_turns(Extent(0.1, rounds=9, least=20))[0] == 9


def test_if_one_is_gone_the_other_keeps_what_it_has(tmp_path):
    two = Two(tmp_path, 6, 6)
    two.runs[1]._process.kill()
    pairs, done = two.take_turns(Extent(60.0, rounds=6))
    assert (pairs, done) == (0, "a."), "it was told that this is all"
    assert two.statuses[0] == 0


def test_who_has_fewer_rounds_ends_it(tmp_path):
    two = Two(tmp_path, 6, 2)
    pairs, done = two.take_turns(Extent(60.0, rounds=6))
    assert (pairs, done.replace(".", "")) == (2, "ababa")
    assert done.count(".") == 2 and two.statuses == [0, 0]


def test_they_end_with_who_leads(tmp_path):
    two = Two(tmp_path, 5, 5)
    for run in two.runs:
        run.end()
    assert two.log.read_text() == "!.!.", "what there is is the result"


def test_who_does_not_begin_is_told_of(tmp_path):
    with (tmp_path / "said").open("w") as said:
        run = Run(lambda word: [sys.executable, "-c", ""], "id", said)
        assert not run.warmed() and run.end() == 0
        with pytest.raises(OSError):
            Run(lambda word: [str(tmp_path / "nothing")], "id", said)
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
        scenarios.offline_in_turns(takes(0.001), Extent(0.2, rounds=6, least=6), 1, Ended(0.0))
    assert len(ended.value.throughput.rates) == 2


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "offline"])
def test_figures_are_of_ones_own_time(scenario):
    engine = FakeEngine()
    step = engine.step
    engine.step = lambda until=None: time.sleep(0.1) or step()
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
        with pytest.raises(ValueError, match="take 6 rounds and queries of each launch"):
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


def side_of(words: str, against: str, server: str | None = None) -> Side:
    args = SimpleNamespace(words=words.split(), against=against, server=server)
    vars(args).update(slots=1, queue_size=4)
    return bench_against.other(args)


def test_the_other_is_told_the_same_but_for_what_it_measures(tmp_path):
    """With what are the defaults of an engine in this version; how long is said of each launch."""
    python = [sys.executable, "-m", "nuwa.runtime"]
    folder, ours = str(tmp_path), ["--queue-size", "4", "--slots", "1"]
    told = f"--prompt b --task t2i b --against {folder} --out o --scores s --seconds=3 --rounds 4"
    side = side_of(told, folder)
    assert side.program == python
    assert side.words == ["--instead", folder, *ours, "--prompt", "b", "--task", "t2i", "b"]
    side = side_of("--server h:1 b --against g:2 --metrics h:3 --model m --tls", "g:2", "h:1")
    words = ["--server", "h:1", "b", "--model", "m", "--tls"]
    assert side.program == python and side.words == ["--instead", "g:2", *words]
    side = side_of(f"b --against={sys.executable} --launches 2 --task t2v", sys.executable)
    assert (side.program, side.words) == ([sys.executable], [*ours, "b", "--task", "t2v"])
    for nothing in ("nothing", ""):
        with pytest.raises(ValueError, match="neither a bundle's folder nor a program"):
            side_of("b", nothing)


def test_the_other_measures_what_it_was_told_to():
    args = SimpleNamespace(bundle=["b"], server=None, preset="base", precision="fp16", instead="x")
    bench_against.measure_instead(args)
    assert (args.bundle, args.server, args.preset, args.precision) == (["x"], None, None, None)
    args = SimpleNamespace(bundle=["b"], server="h:1", preset=None, precision=None, instead="g:2")
    bench_against.measure_instead(args)
    assert (args.bundle, args.server) == ([], "g:2")


def result(ratios: list[float], answered: int = 9, **rounds: list) -> dict:
    told = {"latency": [[each] for each in ratios]} | rounds
    metrics = {name: {"unit": "s", "better": "lower"} for name in told}
    outcomes = {"ok": answered, "INTERNAL": 10 - answered}
    return {"metrics": metrics, "rounds": told, "turns": {"id": "x"}, "outcomes": outcomes}


def test_launches_that_do_not_agree_tell_nothing():
    """Each alone would be sure of its difference."""

    def launches(*factors: float):
        even = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98]
        return [(result(even), result([factor * each for each in even])) for factor in factors]

    for pair in launches(1.10, 1.12):
        assert compare.compare_results(*pair)[0].verdict == "slower"
    assert compare_launches(launches(1.1))[0] == compare.compare_results(*launches(1.1)[0])[0]
    (apart, failed) = compare_launches(launches(1.2, 0.95, 1.1, 1.0))
    assert apart.verdict == "no difference" and apart.launches == pytest.approx((1.2, 0.95, 1.1, 1))
    assert apart.low < 1 < apart.ratio < apart.high and apart.ratio > 1.05
    assert failed.verdict == "no difference" and failed.b == failed.a == pytest.approx(0.1)
    (agreed, _) = compare_launches(launches(1.09, 1.11, 1.10))
    assert agreed.verdict == "slower" and agreed.ratio == pytest.approx(1.1, rel=1e-4)
    logs = np.log(agreed.launches)
    half = 4.3027 * logs.std(ddof=1) / 3**0.5  # Student's t of 2 degrees of freedom
    assert np.log(agreed.high) == pytest.approx(logs.mean() + half, rel=1e-4)
    assert np.log(agreed.low) == pytest.approx(logs.mean() - half, rel=1e-3)
    assert agreed.b / agreed.a == pytest.approx(1.1, rel=1e-3)


def test_launches_that_know_too_little():
    some = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]
    pairs = [(result(some), result(some, 5)), (result(some), result(some[:5], 5))]
    latency, failed = compare_launches(pairs)
    assert latency.verdict == "unknown" and latency.launches == (1.0,)
    assert latency.reason == "known of 1 of at least 2 launches: 5 of at least 6 pairs of rounds"
    assert failed.verdict == "slower" and (failed.a, failed.b) == pytest.approx((0.1, 0.5))
    with pytest.raises(ValueError, match="no launch has results of both"):
        compare_launches([])


def test_of_several_launches_the_middle_one_is_shown_and_all_are_kept():
    results = [
        result([speed], answered, throughput=[[1 / speed]])
        | {"when": f"day {number}", "notes": ["same", f"of {number}"], "steps": [number]}
        for number, (speed, answered) in enumerate([(1.2, 9), (1.0, 9), (1.1, 5)])
    ]
    joined = together(results)
    assert joined["steps"] == [2] and joined["rounds"] == results[2]["rounds"]
    assert joined["when"] == "day 0" and joined["outcomes"] == {"ok": 23, "INTERNAL": 7}
    assert joined["notes"] == [
        "Figures are of launch 3 of 3, the middle one; --compare takes all of them.",
        *("same", "of 0", "of 1", "of 2"),
    ]
    assert [each["rounds"] for each in joined["each_launch"]] == [
        each["rounds"] for each in results
    ]
    assert "interrupted" not in joined and "steps" not in joined["each_launch"][0]
    one = together([results[0] | {"interrupted": True}])
    assert one["notes"] == ["same", "of 0"] and one["interrupted"]


def test_processes_that_differ_by_chance_are_told_for_the_same():
    """Each launch of a build is some percent off, in all of its rounds."""
    draw, told, as_one = random.Random(2), [], []
    for _ in range(40):
        pairs = []
        for _ in range(bench_against.LAUNCHES):
            own = [draw.gauss(1.0, 0.03) for _ in "ab"]
            rounds = [[[draw.gauss(each, 0.02)] for _ in range(30)] for each in own]
            pairs.append(tuple(result([], latency=each) for each in rounds))
        told.append(compare_launches(pairs)[0].verdict)
        as_one.append(compare.compare_results(*pairs[0], 0.02)[0].verdict)
    assert told.count("no difference") >= 38
    assert as_one.count("no difference") < 30, "one launch would do"


def test_no_launch_is_asked_for_more_than_it_may_have():
    each = bench_against.each_launch(Extent(10.0, rounds=10, least=7, most=8), 5)
    assert [one.most for one in each] == [1, 2, 1, 2, 2] and sum(one.least for one in each) == 6
    assert all(one.least <= one.most for one in each)


def slow(seconds: float) -> FakeEngine:
    engine = FakeEngine()
    step = engine.step
    engine.step = lambda until=None: time.sleep(seconds) or step()
    return engine


SHORT = ["--task", "t2i", "--seconds", "2.4", "--rounds", "12"]


def test_two_servers_in_turns(tmp_path, capsys):
    with Server(slow(0.005), queue_size=8) as a, Server(slow(0.05), queue_size=8) as b:
        words = ["--server", b.address, "--against", a.address, *SHORT, "--out", str(tmp_path)]
        status = main(["bench", *words])
    printed = capsys.readouterr()
    last = json.loads(printed.out.splitlines()[-1])
    assert status == last["status"] == 1, "this one is slower"
    (latency, tail, failed) = last["differences"]
    assert tail["name"] == "latency p90"
    assert latency["verdict"] == "slower" and latency["ratio"] > 1.05 and latency["launches"] == []
    assert failed["verdict"] == "no difference"
    assert (last["a"], last["b"], last["launches"]) == (a.address, "this", 1)
    results = [schema.read(tmp_path / f"launch-1/{side}/result.json") for side in "ab"]
    assert compare.took_turns(*results) and (tmp_path / "launch-1/a/report.html").exists()
    assert [each["workload"]["target"] for each in results] == [
        f"gRPC {a.address}",
        f"gRPC {b.address}",
    ]
    rounds = [len(each["rounds"]["latency"]) for each in results]
    assert 6 <= rounds[0] == rounds[1] <= 12, "fewer where they took long"
    assert f"launch 1 of 1: {rounds[0]} pairs of rounds" in printed.err
    assert json.loads((tmp_path / "comparison.json").read_text()) == last


def test_two_bundles_in_launches(tmp_path, capsys, tiny_bundle):
    out = tmp_path / "out"
    words = [str(tiny_bundle), "--against", str(tiny_bundle), "--no-rates", "--threshold", "9"]
    words += ["--task", "t2i", "--seconds", "0.5", "--rounds", "12", "--launches", "2"]
    assert main(["bench", *words, "--out", str(out)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    latency = last["differences"][0]
    assert latency["verdict"] == "no difference" and len(latency["launches"]) == 2
    assert last["asked_launches"] == last["launches"] == 2 and last["differs"] == []
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.json",
        "launch-1",
        "launch-2",
    ]
    ids = {
        schema.read(path)["turns"]["id"]: path.parent.parent.name
        for path in out.glob("launch-*/*/result.json")
    }
    assert sorted(ids.values()) == ["launch-1", "launch-2"], "a pair of each"


def test_a_launch_that_fails_leaves_those_before_it(tmp_path, capsys, tiny_bundle):
    """The other program does not start a third time."""
    program, starts = tmp_path / "nuwa-of-before", tmp_path / "starts"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        "from nuwa.runtime.cli import main\n"
        f"starts = Path({str(starts)!r})\nstarts.open('a').write('.')\n"
        "sys.exit('no memory') if len(starts.read_text()) == 3 else sys.exit(main(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    words = [str(tiny_bundle), "--against", str(program), "--no-rates", "--threshold", "9"]
    words += ["--task", "t2i", "--seconds", "0.5", "--rounds", "18", "--launches", "3"]
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert f"{program} ended before it began: no memory" in printed.err
    last = json.loads(printed.out.splitlines()[-1])
    assert (last["asked_launches"], last["launches"], last["status"]) == (3, 2, 1)
    assert not last["interrupted"] and len(last["differences"][0]["launches"]) == 2
    assert starts.read_text() == "..."


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
            start_new_session=True,  # as at a terminal all of them hear it
        )
        try:
            # Both have warmed up with a few of these.
            wait_until(lambda: len(a.host.loaded[0].engine.admitted) > 120, 60)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    last = json.loads(out.splitlines()[-1])
    assert last["interrupted"] and last["differences"][0]["verdict"] == "slower"


def test_what_cannot_be_compared_in_turns(tmp_path, capsys, server):
    words = ["bench", "--server", server.address, *SHORT]
    assert main([*words, "--against", "127.0.0.1:1"]) == 2
    assert "127.0.0.1:1 ended before it began: nuwa bench: " in capsys.readouterr().err
    assert main([*words, "--against", server.address, "--loadgen", str(tmp_path)]) == 2
    assert "LoadGen takes no turns" in capsys.readouterr().err
    for other in (["--baseline", "x"], ["--compare", "x", "y"]):
        assert main([*words, "--against", "127.0.0.1:1", *other]) == 2
        assert "--against compares by itself" in capsys.readouterr().err
    assert main([*words, "--against", server.address, "--launches", "2"]) == 2
    assert "--launches 2: servers are launched by who has them" in capsys.readouterr().err
    assert main([*words, "--launches", "2"]) == 2
    assert "--launches 2: servers are launched by who has them" in capsys.readouterr().err
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
    words = ["--server", server.address, *SHORT, "--out", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        found = bench_against.other
        patch.setattr(
            bench_against, "other", lambda args: replace(found(args), program=[str(program)])
        )
        assert main(["bench", *words, "--against", server.address]) == 1
    printed = capsys.readouterr()
    assert "not compared: no launch has results of both" in printed.err
    last = json.loads(printed.out.splitlines()[-1])
    assert last["status"] == 1 and last["differences"] == [] and last["launches"] == 0
    assert schema.read(tmp_path / "out/launch-1/b/result.json")["outcomes"]["ok"]
