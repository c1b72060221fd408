"""`nuwa bench` on an engine whose delays are known, in virtual time: every figure is right."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest

from nuwa.runtime.bench import (
    asking,
    figures,
    measure,
    running,
    scenarios,
    serving,
)
from nuwa.runtime.bench import workload as workloads
from nuwa.runtime.bench.asking import Asker
from nuwa.runtime.bench.observation import Observation, together
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.targets import IN_PROCESS, Target, over_grpc
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.client import LocalClient
from nuwa.runtime.core import QueueFullError, Timings
from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from . import virtual_time
from .fake_engine import FakeEngine

ENCODE, STEP, PIXELS = 0.2, 0.1, 0.15  # seconds; an image takes four steps
WITHIN = 1e-6  # of what is promised, two percent, all is left to the machine


class Delayed(FakeEngine):
    """Its work takes as long as said, in whichever thread does it."""

    def prepare(self, request):
        time.sleep(ENCODE)
        return super().prepare(request)

    def step(self, until=None):
        time.sleep(STEP)
        return super().step()

    def pixels(self, tokens):
        time.sleep(PIXELS)
        return super().pixels(tokens)


@pytest.fixture
def virtual(monkeypatch):
    with virtual_time.passing(monkeypatch) as time_that_passes:
        yield time_that_passes


def about(value: float):
    return pytest.approx(value, rel=WITHIN)


def target_of(client: LocalClient, engine: FakeEngine) -> Target:
    return Target(client, engine.info, IN_PROCESS, None, engine.slots, None)


def measured(engine: FakeEngine, workload: Workload, settings: Settings) -> dict:
    with LocalClient(engine) as client:
        return measure.measure(target_of(client, engine), workload, settings)


def median(metric: dict) -> float:
    return metric["quantiles"]["0.5"]["value"]


@pytest.mark.usefixtures("virtual")
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


@pytest.mark.usefixtures("virtual")
def test_frames_of_a_clip():
    settings = Settings(extent=Extent(0.1, rounds=1, least=6), warm_up=1)
    found = measured(Delayed(), Workload(Task.T2V, frames=3), settings)["metrics"]
    assert median(found["latency"]) == about(ENCODE + 12 * STEP + PIXELS)
    assert median(found["time_to_first_frame"]) == about(ENCODE + 4 * STEP + PIXELS)
    assert median(found["time_per_frame"]) == about(4 * STEP)
    video = 3 / figures.DEFAULT_FRAMES_PER_SECOND
    assert median(found["realtime_factor"]) == about(video / (ENCODE + 12 * STEP + PIXELS))


@pytest.mark.usefixtures("virtual")
def test_several_at_once():
    """Two slots decode side by side; encoding and pixels are one after the other."""
    settings = Settings("multi-stream", Extent(0.1, rounds=2, least=4), streams=2, warm_up=1)
    result = measured(Delayed(slots=2), Workload(Task.T2I), settings)
    latency = result["metrics"]["latency"]
    assert latency["mean"] == about(2 * ENCODE + 4 * STEP + PIXELS)
    assert result["metrics"]["throughput"]["value"] == about(2 / latency["mean"])
    assert result["outcomes"] == {"ok": 4}


@pytest.mark.usefixtures("virtual")
def test_as_many_as_there_can_be():
    """Steps are what takes longest, and what is beside them is hidden behind them."""
    settings = Settings("offline", Extent(8.0, rounds=4), outstanding=4, warm_up=1)
    result = measured(Delayed(), Workload(Task.T2I), settings)
    assert result["metrics"]["throughput"]["value"] == about(1 / (4 * STEP))
    assert len(result["rounds"]["throughput"]) == 4


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "server", "offline"])
def test_building_a_query_is_nobodys_latency(scenario, monkeypatch):
    """It takes longer than the request; of server, where there is time enough between them."""
    whole = ENCODE + 4 * STEP + PIXELS
    built = Workload.query

    def query(workload, number, info, model=""):
        time.sleep(2.0)
        return built(workload, number, info, model)

    monkeypatch.setattr(Workload, "query", query)
    monkeypatch.setattr(scenarios, "arrivals", lambda *_: [4.0, 8.0, 12.0])
    settings = Settings(
        scenario,
        Extent(4.0, rounds=1, least=3, most=6),
        streams=1,
        outstanding=1,
        rate=0.25,
        bound=10.0,
        warm_up=1,
    )
    result = measured(Delayed(), Workload(Task.T2I), settings)
    latency = result["metrics"]["latency"]
    assert latency["least"] == about(whole) == latency["most"]
    if scenario in ("single-stream", "multi-stream"):
        assert result["metrics"]["throughput"]["value"] == about(1 / (2.0 + whole))


def test_of_a_clip_to_continue_only_what_is_given_is_drawn(monkeypatch):
    drawn = []
    plain = workloads.moving_square

    def moving_square(frames, side, number):
        drawn.append(frames)
        return plain(frames, side, number)

    monkeypatch.setattr(workloads, "moving_square", moving_square)
    info = FakeEngine().info
    query = Workload(Task.V2V, frames=1000).query(5, info)
    assert drawn == [2] and query.options["frame_count"] == 1000
    np.testing.assert_array_equal(query.options["video"], plain(1000, info.height, 5)[:2])
    assert len(Workload(Task.V2V, frames=2).query(5, info).options["video"]) == 1


def test_prompts_are_asked_of_every_task():
    info, prompts = FakeEngine().info, ["a red 3 .", "a blue 7 ."]
    for task in Task:
        asked = [Workload(task, prompts=prompts).query(number, info).prompt for number in range(3)]
        assert asked == [prompts[0], prompts[1], prompts[0]], task
        assert bool(Workload(task).query(0, info).prompt) is task.needs_text


@pytest.mark.usefixtures("virtual")
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


@pytest.mark.usefixtures("virtual")
def test_who_is_sent_late_waited_all_the_same(monkeypatch):
    monkeypatch.setattr(scenarios, "MOST_IN_FLIGHT", 1)

    def ask(number: int, scheduled: float) -> Observation:
        sent = time.perf_counter()
        time.sleep(0.05)
        return Observation(scheduled, sent, time.perf_counter())

    (seen,) = scenarios.server(ask, Extent(0.01, rounds=1, least=10, most=10), rate=1000, seed=0)
    latencies = [each.latency for each in seen]
    assert latencies == sorted(latencies) and latencies[-1] > 9 * 0.05


@pytest.mark.usefixtures("virtual")
def test_requests_that_wait_for_each_other():
    """Two are due at once, again and again: of each pair the second gets its slot 4 steps later."""
    apart = 2 * (ENCODE + 4 * STEP + PIXELS)
    due = [apart * (index // 2) for index in range(12)]
    settings = Settings(
        "server", Extent(1.0, rounds=2), rate=2 / apart, bound=1.0, share=0.8, warm_up=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenarios, "arrivals", lambda *_: due)
        result = measured(Delayed(), Workload(Task.T2I), settings)
    whole = ENCODE + 4 * STEP + PIXELS
    latency = result["metrics"]["latency"]
    assert latency["least"] == about(whole) and latency["most"] == about(whole + 4 * STEP)
    assert latency["mean"] == about(whole + 2 * STEP)
    queue = result["phases"]["queue"]
    assert queue["most"] == about(4 * STEP) and queue["mean"] == about(2 * STEP)
    for name, seconds in (("encode", ENCODE), ("decode", 4 * STEP), ("pixels", PIXELS)):
        assert median(result["phases"][name]) == about(seconds), name
    (point,) = result["load"]
    assert point["rate"] == 2 / apart and point["quantile"] is None
    assert set(latency["quantiles"]) == {"0.5", "0.8", "0.9", "0.95", "0.99"}
    assert result["metrics"]["throughput"]["value"] == point["achieved"]


@pytest.mark.usefixtures("virtual")
def test_over_a_connection_refusals_are_outcomes():
    with Server(Delayed(), queue_size=1) as server, over_grpc(server.address) as target:
        asker = Asker(target.client, Workload(Task.T2I), target.info)
        alone = asker(0, time.perf_counter())
        assert alone.ok and alone.latency == about(ENCODE + 4 * STEP + PIXELS)
        assert alone.timings.decode == about(4 * STEP)
        seen = scenarios.offline(asker, Extent(1.5, rounds=1), outstanding=8)
        assert target.slots == 1, "as the server says"
        statuses = Counter(each.status for each in [*seen.rounds[0], *seen.beside])
        assert statuses["ok"] >= 1 and statuses["QUEUE_FULL"] == 8 - seen.outstanding
        assert seen.outstanding < 8 and {each.status for each in seen.rounds[0]} == {"ok"}
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


@pytest.mark.usefixtures("virtual")
def test_who_is_refused_does_not_ask_again_at_once():
    asked = []

    def ask(number: int, scheduled: float) -> Observation:
        asked.append(number)
        return Observation(scheduled, scheduled, scheduled, "QUEUE_FULL")

    found = scenarios.offline(ask, Extent(0.4, rounds=1), outstanding=3)
    assert len(asked) <= 0.5 / scenarios.BACK_OFF + 4, "all but one asked no more"
    assert found.outstanding == 1 and found.rate == 0
    (note, other) = running.refusals(found, 3)
    assert "refused some of 3" in note and "not what the server can do" in other


@pytest.mark.usefixtures("virtual")
def test_offline_backs_down_until_nothing_is_refused():
    under, lock, most = [0], threading.Lock(), 3

    def ask(number: int, scheduled: float) -> Observation:
        with lock:
            if under[0] == most:
                return Observation(scheduled, scheduled, time.perf_counter(), "QUEUE_FULL")
            under[0] += 1
        time.sleep(0.01)
        with lock:
            under[0] -= 1
        return Observation(scheduled, scheduled, time.perf_counter())

    found = scenarios.offline(ask, Extent(1.0, rounds=2), outstanding=8)
    assert found.outstanding == most
    assert all(each.ok for one in found.rounds for each in one)
    failed = [each for each in found.beside if not each.ok]
    assert len(failed) == 8 - most, "they are told, although they do not count"
    (note,) = running.refusals(found, 8)
    assert "3 in the end" in note


@pytest.mark.usefixtures("virtual")
def test_offline_asks_for_as_many_as_it_was_told():
    def ask(number: int, scheduled: float) -> Observation:
        time.sleep(0.002)
        return Observation(scheduled, scheduled, time.perf_counter())

    found = scenarios.offline(ask, Extent(0.02, rounds=2, least=40), outstanding=2)
    assert sum(map(len, found.rounds)) >= 40


def test_ctrl_c_leaves_what_was_observed():
    def until(last: int):
        def ask(number: int, scheduled: float) -> Observation:
            if number == last:
                raise KeyboardInterrupt
            return Observation(scheduled, scheduled, time.perf_counter())

        return ask

    extent = Extent(60.0, rounds=3, least=1, most=30)
    target = Target(None, None, IN_PROCESS, None, 1, None)
    seen = running.run(until(12), target, Settings(extent=extent, outstanding=1), 0)
    assert seen.interrupted and len(seen.asked) == 12 and list(map(len, seen.rounds)) == [10, 2]
    assert any("Interrupted" in note for note in seen.notes)
    with pytest.raises(KeyboardInterrupt):
        running.run(until(0), target, Settings(extent=extent, outstanding=1), 0)


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "server", "offline"])
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_while_threads_are_asking(scenario):
    def ask(number: int, scheduled: float) -> Observation:
        assert threading.current_thread() is not threading.main_thread()
        if number == 12:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return Observation(scheduled, scheduled, time.perf_counter())

    settings = Settings(
        scenario, Extent(30.0, rounds=3), streams=2, outstanding=2, rate=50.0, bound=1.0
    )
    began = time.perf_counter()
    seen = running.run(ask, Target(None, None, IN_PROCESS, None, 1, None), settings, 0)
    assert seen.interrupted and len(seen.asked) >= 6
    assert time.perf_counter() - began < 15


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_does_not_wait_for_who_is_never_answered():
    never = threading.Event()

    def ask(number: int, scheduled: float) -> Observation:
        if number == 12:
            os.kill(os.getpid(), signal.SIGINT)
        if number >= 6:
            never.wait()
        return Observation(scheduled, scheduled, time.perf_counter())

    try:
        with pytest.raises(scenarios.Interrupted) as ended:
            scenarios.server(ask, Extent(30.0, rounds=3), rate=50.0, seed=0)
    finally:
        never.set()
    assert 1 <= sum(map(len, ended.value.rounds)) <= 6


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


def test_a_search_leaves_its_latencies_out_of_comparisons(monkeypatch):
    monkeypatch.setattr(serving, "GUESS_SECONDS", 0.5)
    settings = Settings(
        "server", Extent(0.2, rounds=2), bound=0.1, share=0.5, outstanding=2, warm_up=1
    )
    result = measured(FakeEngine(), Workload(Task.T2I), settings)
    assert result["rounds"] == {} and result["metrics"]["highest_rate"]["value"] > 0
    assert [each for each in result["load"] if each["best"]]
    assert result["search"]["low"] == result["metrics"]["highest_rate"]["value"]
    result["search"] |= {"high": 1.05 * result["search"]["low"], "decided": True}
    halved = json.loads(json.dumps(result))
    halved["metrics"]["highest_rate"]["value"] /= 2
    halved["search"] |= {name: halved["search"][name] / 2 for name in ("low", "high")}
    from nuwa.runtime.bench import compare

    differences = compare.compare_results(result, halved)
    assert [each.verdict for each in differences] == ["slower", "no difference"]
    assert compare.baseline_exit(differences) == 1
    assert compare.baseline_exit(compare.compare_results(result, result)) == 0
    failing = json.loads(json.dumps(result)) | {"outcomes": {"ok": 1, "INTERNAL": 9}}
    assert compare.baseline_exit(compare.compare_results(result, failing)) == 1
