"""The page for people: what it says is what happened, and nothing in it can be injected."""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import grpc
import pytest
from prometheus_client import CollectorRegistry

from nuwa.runtime import history, status_page
from nuwa.runtime.history import Buckets, History, Point
from nuwa.runtime.pages import UNREADY, UNWELL
from nuwa.runtime.server import Server
from nuwa.runtime.status_page import Facts, ModelRow, page
from nuwa.v1 import generation_pb2 as pb

from .fake_engine import FakeEngine
from .messages import image, video, wait_until

INF = float("inf")


@pytest.fixture
def server(engine):
    with Server(engine, queue_size=2, metrics_port=0) as server:
        yield server
        engine.gate.set()


def read(server: Server, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}{path}", timeout=10) as answer:
        return answer.read().decode()


class Cells(HTMLParser):
    """The texts of all table rows; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "path", "line"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        if tag not in ("path", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    def row(self, *beginning: str) -> list[str]:
        return next(row for row in self.rows if row[: len(beginning)] == list(beginning))


def test_it_tells_what_was_generated(stub, server):
    stub.GenerateImage(image())
    list(stub.GenerateVideo(video(frame_count=3)))
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(output=pb.Output(scale_factor=99)))
    text = read(server)
    cells = Cells(text)
    assert ">ready<" in text
    assert cells.row("fake/1")[4:6] == ["0 of 1", "0 of 2"]
    assert cells.row("fake", "t2i")[2:4] == ["1", "0"]
    clip = cells.row("fake", "t2v")
    assert clip[2:4] == ["1", "0"]
    assert all(re.fullmatch(r"\S+ m?s / \S+ m?s", each) for each in clip[4:])
    assert cells.row("INVALID_REQUEST") == ["INVALID_REQUEST", "1"]
    assert "nuwa_requests_total" in read(server, "/metrics")


def test_its_charts_follow_what_goes_on(stub, server, engine, monkeypatch):
    server._history.close()
    server._history.look()
    for _ in range(3):
        stub.GenerateImage(image())
    engine.gate.clear()
    running = stub.GenerateVideo(video())
    assert next(running).HasField("accepted")
    wait_until(lambda: server.scheduler.active == 1)
    server._history.look()
    first, *_, last = server._history.points
    assert last.requests["ok"] - first.requests.get("ok", 0) == 3
    assert last.frames - first.frames == 3
    assert last.gauges["nuwa_slots_used"] == 1 and last.gauges["nuwa_slots"] == 1
    assert last.durations.since(first.durations).total == 3
    text = read(server)
    assert "slots used 1<" in text and "waiting 0<" in text
    engine.gate.set()
    running.cancel()


def test_a_server_that_is_not_ready_says_so(server):
    server._on_health(False)
    assert ">not ready<" in read(server)


def probe(server: Server, path: str) -> tuple[int, str]:
    try:
        return 200, read(server, path)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_probes_over_http_say_what_health_says():
    well, unwell, unready = (200, "ok\n"), (503, f"{UNWELL}\n"), (503, f"{UNREADY}\n")
    with Server(metrics_port=0) as server:
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (well, unready), "no model"
        server.host.add(FakeEngine())
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (well, well)
        server._on_health(False)
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (unwell, unwell)
        server._on_health(True)
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (well, well)
        server._on_death()
        assert (probe(server, "/livez"), probe(server, "/readyz")) == (unwell, unwell)


def test_a_server_that_drains_is_live_and_not_ready(engine):
    server = Server(engine, metrics_port=0, lame_duck=20)
    server.start()
    ending = threading.Thread(target=server.stop, args=(1.0,))
    ending.start()
    wait_until(lambda: probe(server, "/readyz") == (503, f"{UNREADY}\n"))
    assert probe(server, "/livez") == (200, "ok\n")
    server.hasten()
    ending.join(20)
    assert not ending.is_alive()


def test_probes_are_answered_while_a_call_of_the_engine_hangs(server, engine, stub):
    engine.gate.clear()
    running = stub.GenerateVideo(video())
    assert next(running).HasField("accepted")
    wait_until(lambda: server.scheduler.active == 1)
    submitted = len(engine.admitted)
    for _ in range(20):
        assert probe(server, "/livez")[0] == probe(server, "/readyz")[0] == 200
    assert len(engine.admitted) == submitted and server.scheduler.queued == 0
    running.cancel()


def test_there_is_no_other_page(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        read(server, "/other")
    assert caught.value.code == 404
    told = caught.value.read()
    assert all(path in told for path in (b"/metrics", b"/livez", b"/readyz"))


def test_names_are_text():
    row = ModelRow("<b>x</b>/1", "T2I", "cpu", "fp32", 1, 0, 0, 1, "abc")
    facts = Facts("1", "<script>", True, 5.0, 10.0, [row])
    text = page(facts, [], CollectorRegistry())
    assert "<script>" not in text and "<b>x" not in text
    assert "&lt;b&gt;x&lt;/b&gt;/1" in text
    Cells(text)


def test_quantiles_are_those_of_prometheus():
    found = Buckets((0.1, 0.2, 0.4, INF), (2, 6, 8, 10))
    assert found.quantile(0.1) == pytest.approx(0.05)
    assert found.quantile(0.4) == pytest.approx(0.15)
    assert found.quantile(0.7) == pytest.approx(0.3)
    assert found.quantile(0.99) == pytest.approx(0.4), "the last bound that is finite"
    assert Buckets().quantile(0.5) is None
    later = Buckets(found.bounds, (2, 6, 12, 14))
    assert later.since(found).quantile(0.5) == pytest.approx(0.3)
    assert later.since(Buckets()) == later
    assert found.since(found).quantile(0.5) is None


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (0.003, 0.005), (1, 1), (1.1, 2), (4.5, 5), (7, 10), (52, 100)]
)
def test_axes_end_at_round_numbers(value, top):
    assert status_page._round_up(value) == pytest.approx(top)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (150, "2.5 min"), (7200, "2 h"), (400_000, "4.6 days")]
)
def test_durations_read_well(seconds, text):
    assert status_page._duration(seconds) == text


def test_a_history_keeps_only_so_many_and_survives_a_failure(monkeypatch, caplog):
    monkeypatch.setattr(history, "INTERVAL", 0.001)
    monkeypatch.setattr(history, "POINTS", 20)
    taken = []

    def take() -> Point:
        taken.append(1)
        if len(taken) == 3:
            raise RuntimeError("once")
        return Point(float(len(taken)))

    kept = History(take)
    kept.start()
    wait_until(lambda: len(taken) > history.POINTS + 10)
    kept.close()
    assert len(kept.points) == history.POINTS
    assert [p.time for p in kept.points] == sorted(p.time for p in kept.points)
    assert "the history has a gap" in caplog.text
