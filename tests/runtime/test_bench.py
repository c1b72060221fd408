"""`nuwa bench` on an engine whose delays are known: every figure is right within two percent."""

from __future__ import annotations

import functools
import json
import threading
import time

import numpy as np
import pytest

from nuwa.runtime.bench import (
    asking,
    figures,
    loadgen,
    measure,
    running,
    scenarios,
    schema,
    search,
    sweep,
)
from nuwa.runtime.bench.asking import Asker
from nuwa.runtime.bench.observation import Observation, together
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.targets import IN_PROCESS, Target, over_grpc
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.cli import main
from nuwa.runtime.client import LocalClient
from nuwa.runtime.core import QueueFullError, Timings
from nuwa.runtime.errors import UnavailableError
from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine

ENCODE, STEP, PIXELS = 0.2, 0.1, 0.15  # seconds; an image takes four steps
WITHIN = 0.02


class Delayed(FakeEngine):
    """Its work takes as long as said, in whichever thread does it."""

    def prepare(self, request):
        time.sleep(ENCODE)
        return super().prepare(request)

    def step(self):
        time.sleep(STEP)
        return super().step()

    def pixels(self, tokens):
        time.sleep(PIXELS)
        return super().pixels(tokens)


ATTEMPTS = 3


def patiently(test):
    """Again if it fails: other work on the machine makes sleeps longer, never shorter."""

    @functools.wraps(test)
    def again():
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return test()
            except AssertionError:
                if attempt == ATTEMPTS:
                    raise

    return again


def about(value: float):
    return pytest.approx(value, rel=WITHIN)


def target_of(client: LocalClient, engine: FakeEngine) -> Target:
    return Target(client, engine.info, IN_PROCESS, None, engine.slots, None)


def measured(engine: FakeEngine, workload: Workload, settings: Settings) -> dict:
    with LocalClient(engine) as client:
        return measure.measure(target_of(client, engine), workload, settings)


def median(metric: dict) -> float:
    return metric["quantiles"]["0.5"]["value"]


@patiently
def test_one_image_after_another():
    settings = Settings(extent=Extent(0.1, rounds=3, least=6), warm_up=2)
    result = measured(Delayed(), Workload(Task.T2I), settings)
    whole = ENCODE + 4 * STEP + PIXELS
    assert median(result["metrics"]["latency"]) == about(whole)
    assert result["metrics"]["throughput"]["value"] == about(1 / whole)
    for name, seconds in (("encode", ENCODE), ("decode", 4 * STEP), ("pixels", PIXELS)):
        assert median(result["phases"][name]) == about(seconds), name
    assert result["phases"]["client"]["mean"] < WITHIN * whole
    assert result["metrics"]["measuring"]["value"] < 0.01
    assert result["outcomes"] == {"ok": 6}
    assert [len(each) for each in result["rounds"]["latency"]] == [2, 2, 2]
    assert result["warm_up"]["requests"] == 2 and not result["warm_up"]["steady"]
    assert any("not steady" in note for note in result["notes"])
    assert "time_to_first_frame" not in result["metrics"]
    assert result["metrics"]["early_stopping_p90"]["needs"] > 6
    assert result["metrics"]["latency"]["quantiles"]["0.99"] == {"needs": 368}


@patiently
def test_frames_of_a_clip():
    settings = Settings(extent=Extent(0.1, rounds=1, least=6), warm_up=1)
    found = measured(Delayed(), Workload(Task.T2V, frames=3), settings)["metrics"]
    assert median(found["latency"]) == about(ENCODE + 12 * STEP + PIXELS)
    assert median(found["time_to_first_frame"]) == about(ENCODE + 4 * STEP + PIXELS)
    assert median(found["time_per_frame"]) == about(4 * STEP)
    video = 3 / figures.DEFAULT_FRAMES_PER_SECOND
    assert median(found["realtime_factor"]) == about(video / (ENCODE + 12 * STEP + PIXELS))


@patiently
def test_several_at_once():
    """Two slots decode side by side; encoding and pixels are one after the other."""
    settings = Settings("multi-stream", Extent(0.1, rounds=2, least=4), streams=2, warm_up=1)
    result = measured(Delayed(slots=2), Workload(Task.T2I), settings)
    latency = result["metrics"]["latency"]
    assert latency["mean"] == about(2 * ENCODE + 4 * STEP + PIXELS)
    assert result["metrics"]["throughput"]["value"] == about(2 / latency["mean"])
    assert result["outcomes"] == {"ok": 4}


@patiently
def test_as_many_as_there_can_be():
    """Steps are what takes longest, and what is beside them is hidden behind them."""
    settings = Settings("offline", Extent(8.0, rounds=4), outstanding=4, warm_up=1)
    result = measured(Delayed(), Workload(Task.T2I), settings)
    assert result["metrics"]["throughput"]["value"] == about(1 / (4 * STEP))
    assert len(result["rounds"]["throughput"]) == 4


def test_poisson_arrivals_are_sent_when_they_are_due():
    due, lock = [], threading.Lock()

    def ask(number: int, scheduled: float) -> Observation:
        with lock:
            due.append((number, scheduled))
        now = time.perf_counter()
        return Observation(scheduled, now, now)

    extent = Extent(1.0, rounds=3)
    rounds = scenarios.server(ask, extent, rate=50, seed=3)
    wanted = list(scenarios.arrivals(50, extent, 3))
    assert [number for number, _ in sorted(due)] == list(range(len(wanted)))
    times = np.array([moment for _, moment in sorted(due)])
    np.testing.assert_allclose(np.diff(times), np.diff(wanted), atol=1e-9)
    assert [one.scheduled for each in rounds for one in each] == times.tolist()
    late = [one.sent - one.scheduled for each in rounds for one in each]
    assert min(late) >= 0 and np.median(late) < 0.01
    draws = np.diff(list(scenarios.arrivals(50, Extent(400.0), 0)))
    assert draws.mean() == pytest.approx(1 / 50, rel=0.03)
    assert draws.std() == pytest.approx(1 / 50, rel=0.03), "exponential"


def test_who_is_sent_late_waited_all_the_same(monkeypatch):
    monkeypatch.setattr(scenarios, "MOST_IN_FLIGHT", 1)

    def ask(number: int, scheduled: float) -> Observation:
        sent = time.perf_counter()
        time.sleep(0.05)
        return Observation(scheduled, sent, time.perf_counter())

    (seen,) = scenarios.server(ask, Extent(0.01, rounds=1, least=10, most=10), rate=1000, seed=0)
    latencies = [each.latency for each in seen]
    assert latencies == sorted(latencies) and latencies[-1] > 9 * 0.05


@pytest.mark.parametrize("capacity", [0.4, 3.0, 77.0])
@pytest.mark.parametrize("guess", [0.3, 1.0, 1.7])
def test_the_highest_rate_is_found(capacity, guess):
    def at(rate: float) -> search.Point:
        return search.Point(rate, min(rate, capacity), 0.1, 0.2, rate <= capacity)

    best, points = search.highest_rate(at, guess * capacity)
    assert 0.94 * capacity <= best <= capacity
    assert [each.rate for each in points] == sorted(each.rate for each in points)
    assert len(points) < 15


def test_no_rate_may_keep_the_bound():
    best, points = search.highest_rate(
        lambda rate: search.Point(rate, rate, 1.0, 1.0, None, 100), 8.0
    )
    assert best is None and len(points) == search.DOUBLINGS


def test_a_rate_keeps_its_bound_only_if_enough_were_asked():
    settings = Settings("server", bound=0.1)

    def points(good: int, bad: int, failed: int = 0) -> search.Point:
        seen = [Observation(i, i, i + 0.05) for i in range(good)]
        seen += [Observation(i, i, i + 0.3) for i in range(bad)]
        seen += [Observation(i, i, i + 0.01, "QUEUE_FULL") for i in range(failed)]
        return running.point(5.0, seen, settings)

    assert points(458, 0).met is None and points(458, 0).needed == 1
    assert points(459, 0).met is True
    assert points(459, 1).met is None
    assert points(200, 0).p99 is None and points(200, 0).p50 == pytest.approx(0.05)
    assert points(100, 60).met is False
    assert points(100, 0, failed=60).met is False, "who is refused is not served in time"


@patiently
def test_over_a_connection_refusals_are_outcomes():
    with Server(Delayed(), queue_size=1) as server, over_grpc(server.address) as target:
        asker = Asker(target.client, Workload(Task.T2I), target.info)
        alone = asker(0, time.perf_counter())
        assert alone.ok and alone.latency == about(ENCODE + 4 * STEP + PIXELS)
        assert alone.timings.decode == about(4 * STEP)
        seen = scenarios.offline(asker, Extent(1.5, rounds=1), outstanding=8)
        statuses = {each.status for each in seen.rounds[0]}
        assert statuses == {"ok", "QUEUE_FULL"}
        settings = Settings(extent=Extent(0.1, rounds=1, least=1), warm_up=1)
        result = measure.measure(target, Workload(Task.T2I), settings)
        assert result["workload"]["target"] == f"gRPC {server.address}"
        assert result["card"] == {} and result["memory"]["process_peak_bytes"] is None
        assert median_or_mean(result["metrics"]["latency"]) == about(ENCODE + 4 * STEP + PIXELS)


def median_or_mean(metric: dict) -> float:
    return metric["quantiles"]["0.5"].get("value", metric["mean"])


def test_errors_have_the_names_that_servers_give_them():
    assert asking.reason_of(QueueFullError("full")) == "QUEUE_FULL"
    assert asking.reason_of(KeyError("x")) == "KeyError"


def test_what_is_wrong_with_a_request_is_told_before_anything_is_measured():
    with LocalClient(FakeEngine()) as client:
        target = target_of(client, FakeEngine())
        with pytest.raises(ValueError, match="prompt 'refused' is refused"):
            measure.measure(target, Workload(Task.T2I, prompts=["refused"]), Settings())
    with pytest.raises(ValueError, match="scenario 'x' is not one of single-stream"):
        Settings("x")
    with pytest.raises(ValueError, match="needs a bound"):
        Settings("server")


def test_requests_are_the_same_wherever_they_are_made():
    info = FakeEngine().info
    for task in info.tasks:
        workload = Workload(task)
        first, again, second = (workload.query(number, info) for number in (3, 3, 4))
        assert first.prompt == again.prompt and first.options["seed"] == 3
        assert second.options["seed"] == 4
        for name, value in first.options.items():
            np.testing.assert_array_equal(value, again.options[name])
        with LocalClient(FakeEngine()) as client:
            assert Asker(client, workload, info)(0, time.perf_counter()).ok, task


def test_a_query_of_several_requests_ends_with_the_last():
    slow = Observation(1.0, 1.0, 4.0, frames=(4.0,), timings=Timings(total=2.9))
    quick = Observation(1.0, 1.1, 2.0, frames=(2.0,), timings=Timings(total=0.9))
    both = together([quick, slow])
    assert (both.latency, both.frames, both.timings.total) == (3.0, (2.0, 4.0), 2.9)
    refused = Observation(1.0, 1.0, 1.1, "QUEUE_FULL")
    assert together([slow, refused]).status == "QUEUE_FULL"


def test_steps_stand_beside_their_floors():
    card = {"floor_by_rows": [{"rows": 4, "steps": 2, "seconds": 0.5}]}
    found = figures.steps([(4, 1.0), (4, 2.0), (4, 3.0), (9, 1.0)], card)
    assert found == [
        {"rows": 4, "count": 3, "median": 2.0, "p99": None, "floor": 0.5},
        {"rows": 9, "count": 1, "median": 1.0, "p99": None, "floor": None},
    ]


def test_the_timeline_is_of_phases_in_order():
    times = Timings(queue=0.5, encode=0.25, decode=1.0, pixels=0.5, total=2.0)
    (shown,) = figures.timeline([Observation(10.0, 10.25, 12.5, timings=times)])
    assert (shown["start"], shown["end"]) == (0.0, 2.5)
    assert shown["phases"] == {
        "late": [0.0, 0.25],
        "queue": [0.25, 0.75],
        "encode": [0.75, 1.0],
        "decode": [1.0, 2.0],
        "pixels": [2.0, 2.25],
        "client": [2.25, 2.5],
    }


def choice(name: str) -> sweep.Choice:
    return sweep.Choice(name, "auto", None, 2)


def test_settings_that_others_beat_are_not_worth_having():
    outcomes = sweep.ranked(
        [
            sweep.Outcome(choice("slow"), "fp32", 3.0, 1.0),
            sweep.Outcome(choice("quick"), "fp32", 1.0, 2.0),
            sweep.Outcome(choice("wide"), "fp32", 2.5, 9.0),
            sweep.Outcome(choice("middle"), "fp32", 1.1, 5.0),
            sweep.Outcome(choice("same"), "fp32", 1.1, 5.0),
            sweep.Outcome(choice("gone"), problem="no such processor"),
        ]
    )
    names = [one.choice.bundle for one in outcomes]
    assert names == ["quick", "middle", "same", "wide", "slow", "gone"]
    assert [one.worth for one in outcomes] == [True, True, True, True, False, False]
    assert sweep.best(outcomes, "latency").choice.bundle == "quick"
    assert sweep.best(outcomes, "throughput").choice.bundle == "wide"
    assert sweep.best(outcomes, "balance").choice.bundle == "middle"
    with pytest.raises(ValueError, match="settings could be measured: gone.*no such processor"):
        sweep.best(outcomes[-1:], "latency")
    with pytest.raises(ValueError, match="'x' is not one of latency"):
        sweep.best(outcomes, "x")


def test_the_best_settings_are_what_a_server_reads(tmp_path):
    from nuwa.runtime.settings import read

    file = tmp_path / "server.toml"
    found = sweep.Outcome(sweep.Choice("b", "auto", 2, 4), "fp32", 0.5, 3.0)
    file.write_text(sweep.to_toml(found))
    settings = read({}, file, {})
    assert (str(settings.bundle), settings.threads, settings.slots) == ("b", 2, 4)


def test_loadgen_agrees(tmp_path):
    """Of the same requests: its 90th percentile beside ours."""
    pytest.importorskip("mlperf_loadgen")
    draw = np.random.default_rng(0)
    sleeps = draw.uniform(0.02, 0.08, 4096)

    def ask(number: int, scheduled: float) -> Observation:
        sent = time.perf_counter()
        time.sleep(sleeps[number])
        return Observation(scheduled, sent, time.perf_counter())

    seen, verdict = loadgen.drive(ask, "single-stream", tmp_path, seconds=5.0, least=64)
    ours = np.quantile([each.latency for each in seen], 0.9, method="inverted_cdf")
    assert verdict.figures["90.00 percentile latency"] == pytest.approx(ours, rel=0.03)
    assert verdict.valid and len(seen) >= 64
    assert "Result is : VALID" in verdict.log


def test_without_loadgen_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlperf_loadgen", None)
    with pytest.raises(UnavailableError, match=r"pip install 'nuwa-runtime\[bench\]'"):
        loadgen.drive(lambda number, due: None, "single-stream", tmp_path, seconds=1)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "name one thing to measure"),
        ("a b", "name one thing to measure"),
        ("a --preset sprites", "name one thing to measure"),
        ("a --seconds 0", "--seconds 0.0 is not above 0"),
        ("a --percentile 100", "--percentile 100.0 is not between 0 and 100"),
        ("a --scenario server", "needs a bound"),
        ("a --rate -1", "--rate -1.0 is not above 0"),
        ("a --task x", "'x'"),
        ("a --samples 3", "--samples (above 1) and --rank-by go together"),
        ("sweep", "which bundles?"),
        ("sweep a --slots-of 1,x", "--slots-of '1,x' is not N,N,..."),
        ("sweep a --backends gpu", "backend 'gpu' is not one of"),
        ("/nowhere", "does not exist"),
        ("--compare /nowhere /nowhere", "/nowhere"),
    ],
)
def test_the_command_says_what_is_wrong(words, problem, capsys):
    assert main(["bench", *words.split()]) == 2
    assert problem in capsys.readouterr().err


def test_the_command_measures_a_server(tmp_path, capsys):
    with Server(FakeEngine(), queue_size=8) as server:
        words = ["--server", server.address, "--task", "t2v", "--frames", "2", "--seconds", "1"]
        words += ["--rounds", "3", "--out", str(tmp_path / "a")]
        assert main(["bench", *words]) == 0
        printed = capsys.readouterr()
        last = json.loads(printed.out.splitlines()[-1])
        assert last["schema"] == schema.SCHEMA and "rounds" not in last
        result = schema.read(tmp_path / "a" / "result.json")
        assert result["metrics"] == last["metrics"]
        assert "<html" in (tmp_path / "a" / "report.html").read_text()
        assert main(["bench", *words[:-1], str(tmp_path / "b")]) == 0
        capsys.readouterr()
    paths = [str(tmp_path / name / "result.json") for name in "ab"]
    assert main(["bench", "--compare", *paths]) == 0
    assert "latency" in capsys.readouterr().out


def test_a_sweep_writes_what_it_found(tmp_path, capsys, monkeypatch):
    from nuwa.runtime.commands import bench

    made = [
        sweep.Outcome(choice("quick"), "fp32", 0.1, 2.0),
        sweep.Outcome(choice("wide"), "int8", 0.25, 9.0),
        sweep.Outcome(choice("<gone>"), problem="no such processor"),
    ]
    monkeypatch.setattr(sweep, "sweep", lambda *arguments: sweep.ranked(made))
    words = ["sweep", "b", "--slots-of", "2", "--out", str(tmp_path), "--prefer", "throughput"]
    assert main(["bench", *words]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["best"]["choice"]["bundle"] == "wide"
    assert "no such processor" in printed and "250 ms" in printed
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<circle") >= 2 and "<gone>" not in page and "&lt;gone&gt;" in page
    assert 'bundle = "wide"' in (tmp_path / "server.toml").read_text()
    assert len(json.loads((tmp_path / "sweep.json").read_text())["outcomes"]) == 3
    assert bench.SWEEP == "sweep"


def test_a_sweep_measures_each(monkeypatch, tmp_path):
    import contextlib

    @contextlib.contextmanager
    def opened(path, *, slots, threads, backend, queue_size):
        if backend == "gpu":
            raise UnavailableError("there is no GPU")
        engine = FakeEngine(slots)
        with LocalClient(engine, queue_size=queue_size) as client:
            yield target_of(client, engine)

    monkeypatch.setattr(sweep, "in_process", opened)
    wanted = list(sweep.choices(["b"], ["cpu", "gpu"], [None], [1, 2]))
    found = sweep.sweep(wanted, Workload(Task.T2I), 0.4)
    assert len(found) == 4
    assert sorted(one.problem for one in found) == [
        "",
        "",
        *["UnavailableError: there is no GPU"] * 2,
    ]
    assert all(one.latency > 0 and one.throughput > 1 for one in found if not one.problem)


def test_throughput_of_answers_that_take_longer_than_a_round():
    """One every two seconds, in rounds of one; and batches."""
    single = [Observation(i, i, i) for i in range(0, 22, 2)]
    found = scenarios.sliced(single, 0.0, 2.0, 22.0, rounds=20)
    assert found.rate == pytest.approx(0.5) and found.rates == pytest.approx([0.5] * 10)
    batches = [Observation(i, i, i + j * 1e-3) for i in (0, 10, 20, 30, 40) for j in range(8)]
    found = scenarios.sliced(batches, 0.0, 5.0, 45.0, rounds=10)
    assert found.rate == pytest.approx(0.8, rel=0.01)
    late = [Observation(0.0, 0.0, 30.0)]
    found = scenarios.sliced(late, 0.0, 1.0, 11.0, rounds=5)
    assert found.rate == pytest.approx(1 / 30) and found.rates == [] and found.rounds == [late]
    assert scenarios.sliced([], 0.0, 1.0, 11.0, rounds=5).rate == 0.0


def test_an_extent_is_kept_whatever_its_rounds():
    seen = []

    def ask(number: int, scheduled: float) -> Observation:
        seen.append(number)
        return Observation(scheduled, scheduled, scheduled)

    for most in (5, 25):
        seen.clear()
        rounds = scenarios.single_stream(ask, Extent(0.05, rounds=10, least=25, most=most))
        assert len(seen) == most and sum(map(len, rounds)) == most and len(rounds) == 10
    seen.clear()
    scenarios.offline(ask, Extent(0.5, rounds=2, most=7), outstanding=3)
    assert sorted(seen) == list(range(7))


def test_who_is_refused_does_not_ask_again_at_once():
    asked = []

    def ask(number: int, scheduled: float) -> Observation:
        asked.append(number)
        return Observation(scheduled, scheduled, scheduled, "QUEUE_FULL")

    scenarios.offline(ask, Extent(0.4, rounds=1), outstanding=2)
    assert len(asked) <= 2 * (0.5 / scenarios.BACK_OFF) + 2


def test_of_several_models_the_one_that_was_named_is_measured():
    other = FakeEngine()
    with Server(FakeEngine(), queue_size=8) as server:
        server.host.add(other, "other")
        with over_grpc(server.address, model="other") as target:
            result = measure.measure(
                target, Workload(Task.T2I), Settings(extent=Extent(0.1, rounds=1), warm_up=1)
            )
    assert result["outcomes"]["ok"] >= 1
    assert len(other.admitted) == 2 + result["outcomes"]["ok"], "the check, and the warm-up"
    assert result["power"] is None and "client's" in result["notes"][0]


def test_loadgen_does_not_know_that_requests_were_refused(tmp_path):
    pytest.importorskip("mlperf_loadgen")

    def ask(number: int, scheduled: float) -> Observation:
        time.sleep(0.001)
        return Observation(scheduled, scheduled, time.perf_counter(), "QUEUE_FULL")

    seen, verdict = loadgen.drive(ask, "multi-stream", tmp_path, seconds=0.5, least=700, streams=4)
    assert not verdict.valid and "QUEUE_FULL" in verdict.problem
    assert "Result is : VALID" in verdict.log
    assert len(seen) == verdict.figures["queries"] if "queries" in verdict.figures else len(seen)


def test_a_search_leaves_its_latencies_out_of_comparisons():
    settings = Settings(
        "server", Extent(0.2, rounds=2), bound=1.0, share=0.5, outstanding=2, warm_up=1
    )
    result = measured(FakeEngine(), Workload(Task.T2I), settings)
    assert result["rounds"] == {} and result["metrics"]["highest_rate"]["value"] > 0
    assert [each for each in result["load"] if each["best"]]
    halved = json.loads(json.dumps(result))
    halved["metrics"]["highest_rate"]["value"] /= 2
    from nuwa.runtime.bench import compare

    differences = compare.compare_results(result, halved)
    assert [each.verdict for each in differences] == ["slower", "no difference"]
    assert compare.baseline_exit(differences) == 1
    assert compare.baseline_exit(compare.compare_results(result, result)) == 0
    failing = json.loads(json.dumps(result)) | {"outcomes": {"ok": 1, "INTERNAL": 9}}
    assert compare.baseline_exit(compare.compare_results(result, failing)) == 1
