"""What Prometheus reads of a server, and that it is what happened."""

from __future__ import annotations

import re
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nuwa.runtime import handle, pages, scheduler
from nuwa.runtime.pages import CONNECTIONS
from nuwa.runtime.server import Server
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import image, video, wait_until, wait_until_told_to_cancel


@pytest.fixture
def server(engine):
    with Server(engine, queue_size=2, metrics_port=0) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def read(server):
    def read(name: str, **labels: str) -> float:
        """A sample's value; 0 if it is not there yet."""
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as page:
            text = page.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0

    return read


def test_what_was_generated_is_counted(stub, read):
    stub.GenerateImage(image())
    list(stub.GenerateVideo(video(frame_count=3)))
    assert read("nuwa_requests_total", task="t2i", outcome="ok") == 1
    assert read("nuwa_requests_total", task="t2v", outcome="ok") == 1
    assert read("nuwa_frames_generated_total", task="t2v") == 3
    assert read("nuwa_step_duration_seconds_count", model="fake") == 16
    assert read("nuwa_ranking_duration_seconds_count") == 0, "nothing was ranked"
    stub.GenerateImage(image(rank_by="first", sample_count=2))
    assert read("nuwa_ranking_duration_seconds_count") == 1
    for phase in ("queue", "encode", "decode", "pixels", "request"):
        assert read(f"nuwa_{phase}_duration_seconds_count", task="t2i") == 2
    assert read("nuwa_time_to_first_frame_seconds_count", task="t2v") == 1
    first = read("nuwa_time_to_first_frame_seconds_sum", task="t2v")
    assert 0 < first <= read("nuwa_request_duration_seconds_sum", task="t2v")
    assert read("nuwa_request_duration_seconds_bucket", task="t2v", le="+Inf") == 1
    assert read("nuwa_model_info", precision="fp32", backend="fake") == 1


def test_the_page_on_serving_names_every_metric(server, stub):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    phases = re.search(r"`nuwa_queue_duration_seconds`, and (.*) in place of `queue`", page)[1]
    named = {f"nuwa_{each}_duration_seconds" for each in re.findall(r"`(\w+)`", phases)}
    named |= set(re.findall(r"`(nuwa_\w+)`", page))
    stub.GenerateImage(image())
    families = server.metrics.registry.collect()
    kinds = {each.name: each.type for each in families if each.name.startswith("nuwa_")}
    there = {f"{n}_total" if kind == "counter" else n for n, kind in kinds.items()}
    about = {name for name, kind in kinds.items() if kind == "info"}
    assert "nuwa_slots" in there and there - about <= named


def test_gauges_follow_what_is_going_on(stub, engine, server, read):
    assert (read("nuwa_slots"), read("nuwa_queue_size"), read("nuwa_ready")) == (1, 2, 1)
    engine.gate.clear()
    calls = [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 1)
    assert (read("nuwa_slots_used"), read("nuwa_requests_waiting")) == (1, 1)
    wait_until(lambda: read("nuwa_calls_open") == 2)
    assert read("nuwa_engine_busy_seconds") > 0
    engine.gate.set()
    for call in calls:
        call.result(20)
    wait_until(lambda: read("nuwa_calls_open") == read("nuwa_slots_used") == 0)
    server._on_death()
    assert read("nuwa_ready") == 0


def test_errors_are_counted_by_their_reason(stub, engine, server, read):
    for _ in range(2):
        with pytest.raises(grpc.RpcError):
            stub.GenerateImage(image(rank_by="x"))
    assert read("nuwa_errors_total", reason="INVALID_REQUEST") == 2
    engine.step_error = RuntimeError("a fault")
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image())
    assert read("nuwa_requests_total", task="t2i", outcome="engine") == 1
    assert read("nuwa_errors_total", reason="INTERNAL") == 1
    engine.gate.clear()
    calls = [stub.GenerateImage.future(image())]
    wait_until(lambda: server.scheduler.active == 1)
    calls += [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.queued == 2)
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image())
    assert read("nuwa_errors_total", reason="QUEUE_FULL") == 1
    assert read("nuwa_requests_total", task="none", outcome="queue_full") == 1
    engine.gate.set()
    for call in calls:
        call.result(20)


def test_cancellations_are_counted_and_timed(stub, engine, server, read):
    engine.gate.clear()
    call = stub.GenerateVideo(video())
    assert next(call).HasField("accepted")
    call.cancel()
    wait_until_told_to_cancel(server)
    engine.gate.set()
    wait_until(lambda: read("nuwa_requests_total", task="t2v", outcome="cancelled") == 1)
    wait_until(lambda: read("nuwa_cancel_latency_seconds_count", model="fake") == 1)
    assert read("nuwa_requests_total", task="t2v", outcome="ok") == 0


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_deadlines_that_are_missed_are_counted_and_timed(
    stub, engine, read, caplog, monkeypatch, kind
):
    caplog.set_level("INFO", "nuwa.runtime")
    for module in (handle, scheduler):  # a request may take as long as this to arrive
        monkeypatch.setattr(module, "TOLERANCE", 0.5)
    engine.gate.clear()
    task = "t2i" if kind == "image" else "t2v"
    with pytest.raises(grpc.RpcError) as caught:
        if kind == "image":
            stub.GenerateImage(image(request_id="late"), timeout=1.0)
        else:
            list(stub.GenerateVideo(video(request_id="late"), timeout=1.0))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.gate.set()
    wait_until(lambda: read("nuwa_requests_total", task=task, outcome="deadline") == 1)
    assert read("nuwa_requests_total", task=task, outcome="cancelled") == 0
    assert read("nuwa_request_duration_seconds_count", task=task) == 1
    assert read("nuwa_request_duration_seconds_sum", task=task) >= 0.25
    assert read("nuwa_queue_duration_seconds_count", task=task) == 1
    wait_until(lambda: f"late {task}: deadline after " in caplog.text)


def test_the_time_in_the_queue_counts_although_it_was_in_vain(stub, engine, read, monkeypatch):
    for module in (handle, scheduler):
        monkeypatch.setattr(module, "TOLERANCE", 0.5)
    engine.gate.clear()
    running = stub.GenerateVideo(video(frame_count=1))
    assert next(running).HasField("accepted")
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(), timeout=1.0)
    wait_until(lambda: read("nuwa_requests_total", task="t2i", outcome="deadline") == 1)
    assert read("nuwa_queue_duration_seconds_sum", task="t2i") >= 0.25
    engine.gate.set()
    list(running)


def test_there_is_nothing_else_there(server):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{server.metrics_address}/secrets", timeout=10)


def test_a_taken_port_is_told_of(server):
    port = int(server.metrics_address.rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} for metrics"):
        Server(FakeEngine(), metrics_port=port)


def test_metrics_are_off_unless_asked_for(engine):
    with Server(engine) as server, grpc.insecure_channel(server.address) as channel:
        generation_pb2_grpc.GenerationServiceStub(channel).GenerateImage(image())
        assert server.metrics_address is None


@pytest.fixture
def connect(server):
    """Connections to the port of the metrics, which send nothing by themselves."""
    opened = []

    def connect() -> socket.socket:
        host, _, port = server.metrics_address.rpartition(":")
        opened.append(socket.create_connection((host, int(port)), timeout=10))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def probed(server: Server) -> bytes:
    return urllib.request.urlopen(f"http://{server.metrics_address}/livez", timeout=10).read()


def threads_of_pages() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_idle_connections_are_bounded_and_keep_no_probe_out(server, connect):
    idle = [connect() for _ in range(3 * CONNECTIONS)]
    assert idle[0].recv(1) == b"", "the oldest is closed at once"
    wait_until(lambda: threads_of_pages() <= CONNECTIONS)
    for _ in range(5):
        assert probed(server) == b"ok\n"
    idle[-1].sendall(b"GET /livez HTTP/1.0\r\n\r\n")
    assert idle[-1].recv(1000).startswith(b"HTTP/1.0 200 OK"), "the newest may take its time"


def test_connections_whose_requests_have_come_give_way_to_nobody(server, connect, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(server._pages, "_live", lambda: release.wait(20))
    asking = [connect() for _ in range(CONNECTIONS)]
    for each in asking:
        each.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
    http = server._pages._server
    wait_until(lambda: len(http._open) == CONNECTIONS and not http._silent)
    assert connect().recv(1) == b"", "there is no room, so it is closed at once"
    release.set()
    assert all(each.recv(1000).startswith(b"HTTP/1.0 200 OK") for each in asking)
    wait_until(lambda: not http._open)
    assert probed(server) == b"ok\n"


def test_a_request_that_comes_byte_by_byte_is_cut_off(server, connect, monkeypatch, capfd):
    monkeypatch.setattr(pages, "REQUEST_SECONDS", 0.3)
    started = time.monotonic()
    slow = connect()
    slow.settimeout(0.05)
    for each in b"GET /livez HTTP/1.0\r\n" + b"A: b\r\n" * 1000:
        try:
            slow.sendall(bytes([each]))
            assert slow.recv(1) == b"", "nothing is answered"
            break
        except TimeoutError:
            pass
        except ConnectionError:
            break
    assert 0.2 < time.monotonic() - started < 15
    wait_until(lambda: not server._pages._server._open)
    assert capfd.readouterr().err == ""
