"""Figures of made-up observations whose answers are known: given frames, energy, floors, drift."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client.exposition import generate_latest

from nuwa.runtime.bench import describe, figures, measure, server_metrics
from nuwa.runtime.bench.figures import Surroundings
from nuwa.runtime.bench.hardware import Hardware
from nuwa.runtime.bench.observation import Observation
from nuwa.runtime.bench.running import Seen, Settings
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.targets import IN_PROCESS, Target, over_grpc
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.client import LocalClient
from nuwa.runtime.core import Timings
from nuwa.runtime.metrics import Metrics
from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine

V2V, T2I = Workload(Task.V2V), Workload(Task.T2I)
CARD = {
    "floor_seconds": 0.5,
    "floor_first_frame_seconds": 0.2,
    "floor_together": {"generations": 4.0, "seconds": 0.2},
    "floor_by_rows": [{"rows": 4, "seconds": 0.01}],
    "floor_of_any_rows": {
        "weights_seconds": 0.004,
        "row_bytes_seconds": 0.001,
        "row_products_seconds": 0.002,
    },
}


def clip(begin: float, frames: int = 10) -> Observation:
    """The two given frames at once, after 0.1 s, then one each 0.05 s."""
    times = [begin + 0.1] * 2 + [begin + 0.5 + 0.05 * frame for frame in range(frames - 2)]
    return Observation(begin, begin, times[-1] + 0.15, frames=tuple(times))


def picture(begin: float, seconds: float = 1.0, status: str = "ok") -> Observation:
    return Observation(begin, begin, begin + seconds, status, (begin + seconds,))


def of(seen: Seen, workload: Workload, settings: Settings, **around) -> dict:
    return figures.metrics(seen, workload, settings, Surroundings(**around))


def test_frames_that_the_client_sent_are_not_counted_as_made():
    seen = Seen([[clip(0.0), clip(1.0)]], 2.0)
    found = of(seen, V2V, Settings(), frames=10, given=2)
    assert found["time_to_first_frame"]["mean"] == pytest.approx(0.5)
    assert found["time_per_frame"]["mean"] == pytest.approx(0.05)
    assert found["realtime_factor"]["mean"] == pytest.approx(8 / figures.DEFAULT_FRAMES_PER_SECOND)
    rounds = figures.in_rounds(seen, V2V, Settings(), given=2)
    assert rounds["time_to_first_frame"][0] == pytest.approx([0.5, 0.5])
    assert describe.given_frames(V2V, 10) == 2 and describe.given_frames(V2V, 2) == 1
    assert describe.given_frames(Workload(Task.T2V), 10) == 0
    only = Observation(0.0, 0.0, 1.0, frames=(0.1, 0.1))
    assert only.time_to_first_frame(2) is None and only.time_per_frame(1) is None


def test_energy_is_of_what_was_made_in_the_counted_time():
    spent = {"of": "board", "joules": 60.0, "idle_watts": 5.0}
    clips = Seen([[clip(0.0), clip(1.0), picture(2.0, 1.0, "QUEUE_FULL")]], 3.0)
    found = of(clips, V2V, Settings(), frames=10, given=2, energy=spent)["energy_per_frame"]
    assert found["value"] == pytest.approx(60 / 16)
    assert (found["unit"], found["of"], found["idle_watts"]) == ("J", "board", 5.0)
    assert found["watts"] == pytest.approx(60 / 2.0), "from the first request to the last answer"
    streams = Settings("multi-stream", streams=4)
    pictures = Seen([[picture(0.0), picture(1.0)]], 2.0)
    each = of(pictures, T2I, streams, energy=spent)["energy_per_image"]
    assert each["value"] == pytest.approx(60 / 8)
    assert "energy_per_image" not in of(pictures, T2I, streams)


def test_offline_answers_are_counted_from_the_first_of_them():
    """Four under way at any time: who began before is work of before."""
    seen = Seen([[picture(0.25 * i) for i in range(9)]], 9.0, rate=4.0, rates=[4.0])
    assert figures.counted(seen, Settings("offline")) == (1.0, 3.0, 8)
    found = of(seen, T2I, Settings("offline"), energy={"of": "board", "joules": 16.0})
    assert found["energy_per_image"]["value"] == pytest.approx(2.0)
    assert found["throughput"]["value"] == 4.0, "as the scenario said it"
    assert figures.counted(Seen([[]], 1.0), Settings()) is None


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        (
            Settings(),
            {
                "latency": 0.5,
                "early_stopping_p90": 0.5,
                "time_to_first_frame": 0.2,
                "realtime_factor": 8 / figures.DEFAULT_FRAMES_PER_SECOND / 0.5,
                "throughput": 2.0,
            },
        ),
        (
            Settings("multi-stream", streams=4),
            {"latency": 0.8, "early_stopping_p99": 0.8, "throughput": 5.0},
        ),
        (Settings("offline"), {"throughput": 5.0}),
        (
            Settings("server", bound=1.0, share=0.95),
            {
                "latency": 0.5,
                "time_to_first_frame": 0.2,
                "realtime_factor": 8 / figures.DEFAULT_FRAMES_PER_SECOND / 0.5,
                "highest_rate": 5.0,
            },
        ),
    ],
)
def test_what_has_a_limit_stands_beside_it(settings, limits):
    load = [{"rate": 4.0, "best": True, "met": True}]
    seen = Seen([[clip(0.0)] * 80], 80.0, rate=None, load=load if settings.bound else [])
    found = of(seen, V2V, settings, card=CARD, frames=10, given=2)
    assert {name: each["floor"] for name, each in found.items() if "floor" in each} == {
        name: pytest.approx(value) for name, value in limits.items()
    }
    if settings.bound:
        assert "0.95" in found["latency"]["quantiles"], "what was asked for"
        assert found["highest_rate"]["floor_fraction"] == pytest.approx(4.0 / 5.0)
    if settings.scenario == "single-stream":
        assert found["latency"]["floor_fraction"] == pytest.approx(0.5)
        assert found["early_stopping_p90"]["floor_fraction"] == pytest.approx(0.5)
    assert not any("floor" in each for each in of(seen, V2V, settings, frames=10).values())


def test_steps_of_any_rows_have_a_floor():
    recorded = [(4, 1.0), (9, 1.0)]
    assert [each["floor"] for each in figures.steps(recorded, CARD)] == [0.01, pytest.approx(0.018)]
    shared = [each["floor"] for each in figures.steps(recorded, CARD, alone=False)]
    assert shared == [pytest.approx(0.008), pytest.approx(0.018)]
    assert [each["floor"] for each in figures.steps(recorded, {})] == [None, None]


def test_a_floor_that_is_beaten_is_noticed():
    step = {"median": 1.0, "floor": 0.9}
    assert not figures.beaten({"metrics": {"a": {"floor_fraction": 0.8}}, "steps": [step]})
    assert figures.beaten({"metrics": {}, "steps": [step, {"median": 0.8, "floor": 0.9}]})
    assert figures.beaten({"metrics": {"a": {"floor_fraction": 1.1}}, "steps": []})
    assert not figures.beaten({"metrics": {"a": {}}, "steps": [{"median": 1.0, "floor": None}]})


def test_rounds_that_become_slower_are_told():
    def rounds(*seconds: float) -> Seen:
        return Seen([[picture(0.0, each)] * 3 for each in seconds], 9.0)

    hot = figures.drift(rounds(1.0, 1.01, 1.05, 1.1, 1.2, 1.21), Settings())
    assert hot["clear"] and hot["slower"] == pytest.approx(1.205 / 1.005 - 1)
    assert not figures.drift(rounds(1.0, 1.3, 1.0, 1.0, 1.2, 1.1), Settings())["clear"]
    assert figures.drift(rounds(1.0, 2.0), Settings()) == {}
    offline = Seen([[picture(0.0)]], 9.0, rate=2.0, rates=[2.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    assert figures.drift(offline, Settings("offline"))["slower"] == pytest.approx(1.0)
    told = measure.notes(
        target_here(),
        {"steady": True},
        {},
        {"drift": hot, "celsius": {"tj": {"before": 50.0, "after": 71.0}}},
        [],
    )
    assert told == [
        "The last rounds were 20 % slower than the first: tj went from 50 to 71 degrees."
    ]


def target_here():
    class Here:
        local = True

    return Here()


def test_what_others_took_is_told():
    taken = {"others_share": 0.25, "others_cores": 0.4, "stolen_cores": 0.1}
    told = measure.notes(target_here(), {"steady": True}, {}, taken, [])
    assert told == ["Others took 25 % of the cores' time meanwhile (0.50 cores)."]
    taken["others_share"] = 0.01
    assert measure.notes(target_here(), {"steady": True}, {}, taken, []) == []


def test_latencies_of_every_scenario_are_kept_but_not_all():
    few = figures.latencies([picture(0.0, seconds) for seconds in (3.0, 1.0, 2.0)])
    assert few == {"count": 3, "values": [1.0, 2.0, 3.0]}
    many = figures.latencies([picture(0.0, 1.0 + i) for i in range(10 * figures.KEPT)])
    assert many["count"] == 10 * figures.KEPT and len(many["values"]) == figures.KEPT
    assert (many["values"][0], many["values"][-1]) == (1.0, float(10 * figures.KEPT))
    assert np.median(many["values"]) == pytest.approx(5 * figures.KEPT, rel=1e-3)
    assert figures.latencies([]) == {"count": 0, "values": []}


def test_phases_are_those_that_timings_have():
    names = figures.phase_names()
    assert names[:2] == ["queue", "encode"] and "total" not in names and "steps" not in names
    seen = [Observation(0.0, 0.0, 1.0, timings=Timings(decode=0.5, total=0.8))]
    assert list(figures.phases(seen)) == ["decode", "client"]


def test_what_is_part_of_decoding_is_drawn_once():
    """Prefill is of decode: pixels, of which some are made meanwhile, come after both."""
    times = Timings(queue=0.1, encode=0.1, decode=0.6, prefill=0.3, pixels=0.7, total=1.0)
    (shown,) = figures.timeline([Observation(0.0, 0.0, 1.1, timings=times)])
    assert {name: pytest.approx(span) for name, span in shown["phases"].items()} == {
        "queue": [0.0, 0.1],
        "encode": [0.1, 0.2],
        "decode": [0.2, 0.8],
        "pixels": [0.8, 1.0],
        "client": [1.0, 1.1],
    }


def test_pictures_of_an_answer_are_encoded():
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    assert figures.encoding("png", frames)["media_encoding"]["count"] == figures.ENCODINGS
    assert figures.encoding("webp", frames[0])["media_encoding"]["mean"] > 0
    assert figures.encoding("raw", frames) == {}


def test_a_small_machine_cools_down(monkeypatch):
    degrees, slept = iter([60.0, 55.0, 51.0]), []
    monkeypatch.setattr(measure.sensors, "hottest", lambda hardware: next(degrees))
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    measure.cool_down(Hardware(), 50.0)
    assert slept == [1.0, 1.0]
    measure.cool_down(Hardware(), None)
    assert slept == [1.0, 1.0], "where there is no sensor"


def test_what_a_server_counted_in_between():
    metrics = Metrics()
    name = metrics.registry

    def page() -> str:
        return generate_latest(name).decode()

    def requests(count: int, seconds: float, model: str = "m") -> None:
        for _ in range(count):
            metrics._duration.labels(model, "t2v").observe(seconds)
            metrics._phases["decode"].labels(model, "t2v").observe(seconds)

    requests(5, 30.0)
    before = page()
    requests(98, 0.03)
    requests(2, 90.0)
    requests(7, 3.0, "other")
    told = server_metrics.difference(before, page(), "m", "t2v")
    assert told["requests"] == 100 and told["steps"] is None
    decode = told["phases"]["decode"]
    assert decode["count"] == 100
    assert decode["mean"] == pytest.approx((98 * 0.03 + 2 * 90) / 100)
    assert decode["quantiles"]["0.5"] == {"low": 0.02, "high": 0.05}
    assert decode["quantiles"]["0.99"] == {"low": 60.0, "high": None}
    assert decode["buckets"][-1] == [None, 100]
    assert set(told["phases"]) == {"decode"}
    again = server_metrics.difference(page(), before, "m", "t2v")
    assert again["requests"] == 5, "a server that was started anew counts from 0"
    with pytest.raises(ValueError, match="no metrics at 127.0.0.1:1"):
        server_metrics.read("127.0.0.1:1")


def with_server_metrics(scenario: str = "single-stream") -> dict:
    settings = Settings(scenario, Extent(0.1, rounds=1, least=3, most=3), streams=2, warm_up=1)
    server = Server(FakeEngine(), queue_size=8, metrics_port=0)
    with server, over_grpc(server.address) as target:
        return measure.measure(target, T2I, settings, metrics_at=server.metrics_address)


def test_a_server_s_own_metrics_stand_in_the_result():
    result = with_server_metrics()
    assert result["server"]["requests"] == 3
    assert result["server"]["phases"]["queue"]["count"] == 3
    assert not any("counted" in note for note in result["notes"])
    assert result["server"]["steps"]["count"] >= 3
    assert "media_encoding" not in result["phases"]


def test_requests_of_multi_stream_queries_are_all_counted():
    result = with_server_metrics("multi-stream")
    assert result["server"]["requests"] == 6 and result["outcomes"] == {"ok": 3}
    assert not any("counted" in note for note in result["notes"])


def test_a_server_that_is_gone_in_the_end_leaves_the_result(monkeypatch):
    read, pages = measure.server_metrics.read, []

    def gone(address: str) -> str:
        pages.append(address)
        if len(pages) == 3:  # after the check, and before measuring
            raise ValueError(f"no metrics at {address}: refused")
        return read(address)

    monkeypatch.setattr(measure.server_metrics, "read", gone)
    result = with_server_metrics()
    assert result["outcomes"] == {"ok": 3} and "server" not in result
    (note,) = [each for each in result["notes"] if "server counted" in each]
    assert note.endswith(": refused.")


def test_ctrl_c_while_rates_are_measured_again_leaves_the_result(monkeypatch):
    class Card:
        rates = "some"

        def again(self):
            raise KeyboardInterrupt

        def to_json(self):
            return {"floor_seconds": None}

        def notes(self):
            return []

    monkeypatch.setattr(measure, "describe_card", lambda *_: Card())
    settings = Settings(extent=Extent(0.1, rounds=1, least=3, most=3), warm_up=1)
    with LocalClient(FakeEngine()) as client:
        target = Target(client, FakeEngine().info, IN_PROCESS, None, 1, None)
        result = measure.measure(target, T2I, settings)
    assert result["outcomes"] == {"ok": 3} and result["interrupted"]
    assert any("all else is whole" in note for note in result["notes"])
