"""What Prometheus reads of a server, and that it is what happened."""

from __future__ import annotations

import urllib.error
import urllib.request

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

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


def test_gauges_follow_what_is_going_on(stub, engine, server, read):
    assert (read("nuwa_slots"), read("nuwa_queue_size"), read("nuwa_ready")) == (1, 2, 1)
    engine.gate.clear()
    calls = [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 1)
    assert (read("nuwa_slots_used"), read("nuwa_requests_waiting")) == (1, 1)
    assert read("nuwa_calls_open") == 2 and read("nuwa_engine_busy_seconds") > 0
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
    assert read("nuwa_cancel_latency_seconds_count", model="fake") == 1
    assert read("nuwa_requests_total", task="t2v", outcome="ok") == 0


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_deadlines_that_are_missed_are_counted_and_timed(stub, engine, server, read, caplog, kind):
    caplog.set_level("INFO", "nuwa.runtime")
    engine.gate.clear()
    task = "t2i" if kind == "image" else "t2v"
    with pytest.raises(grpc.RpcError) as caught:
        if kind == "image":
            stub.GenerateImage(image(request_id="late"), timeout=0.3)
        else:
            list(stub.GenerateVideo(video(request_id="late"), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.gate.set()
    wait_until(lambda: read("nuwa_requests_total", task=task, outcome="deadline") == 1)
    assert read("nuwa_requests_total", task=task, outcome="cancelled") == 0
    assert read("nuwa_request_duration_seconds_count", task=task) == 1
    assert read("nuwa_request_duration_seconds_sum", task=task) >= 0.25
    assert read("nuwa_queue_duration_seconds_count", task=task) == 1
    wait_until(lambda: f"late {task}: deadline after 0." in caplog.text)


def test_the_time_in_the_queue_counts_although_it_was_in_vain(stub, engine, server, read):
    engine.gate.clear()
    running = stub.GenerateVideo(video(frame_count=1))
    assert next(running).HasField("accepted")
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(), timeout=0.3)
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
