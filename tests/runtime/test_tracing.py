"""Traces: what a collector is sent of requests, and that they belong to the client's trace."""

from __future__ import annotations

import logging
import sys
import threading
from concurrent import futures

import grpc
import pytest

from nuwa.inference import grpc_service_pb2_grpc
from nuwa.runtime.errors import UnavailableError
from nuwa.runtime.server import Server
from nuwa.runtime.tracing import Tracing
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import image, video, wait_until

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collected():
    """(endpoint, spans): a collector that keeps what it is sent."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

    spans = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            return collector.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(0)


def values(span) -> dict:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
    }


def test_requests_are_spans_of_the_clients_trace(collected):
    endpoint, spans = collected
    engine = FakeEngine()
    with (
        Server(engine, trace_endpoint=endpoint) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        parent = [("traceparent", f"00-{TRACE}-{SPAN}-01")]
        stub.GenerateImage(image(request_id="mine"), metadata=parent)
        list(stub.GenerateVideo(video(frame_count=2)))
        engine.step_error = RuntimeError("a fault")
        with pytest.raises(grpc.RpcError):
            stub.GenerateImage(image())
    by_name = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    assert {name: len(found) for name, found in by_name.items()} == {
        "generate t2i": 2,
        "generate t2v": 1,
        "queue": 3,
        "generate": 3,
    }
    first, failed = sorted(by_name["generate t2i"], key=lambda span: span.start_time_unix_nano)
    assert first.trace_id.hex() == TRACE and first.parent_span_id.hex() == SPAN
    told = values(first)
    assert told["nuwa.request_id"] == "mine" and told["nuwa.outcome"] == "ok"
    assert told["nuwa.steps"] == 4 and told["nuwa.decode_seconds"] > 0
    assert [event.name for event in first.events] == ["first frame"]
    queue, work = [
        span
        for name in ("queue", "generate")
        for span in by_name[name]
        if span.parent_span_id == first.span_id
    ]
    assert queue.trace_id == work.trace_id == first.trace_id
    assert queue.end_time_unix_nano <= work.start_time_unix_nano
    assert first.start_time_unix_nano <= queue.start_time_unix_nano
    assert work.end_time_unix_nano <= first.end_time_unix_nano
    assert values(failed)["nuwa.outcome"] == "engine" and failed.status.code == 2
    assert failed.trace_id.hex() != TRACE
    assert not any("a 3" in str(span) for span in spans), "no prompts"


def test_calls_that_are_refused_are_spans_of_the_clients_trace(collected):
    endpoint, spans = collected
    parent = [("traceparent", f"00-{TRACE}-{SPAN}-01")]
    engine = FakeEngine()
    with (
        Server(engine, queue_size=1, trace_endpoint=endpoint) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        wrong = [image(request_id="one", rank_by="x"), image(request_id="two", model="other")]
        engine.gate.clear()
        for request in wrong:
            with pytest.raises(grpc.RpcError):
                stub.GenerateImage(request, metadata=parent)
        calls = [stub.GenerateImage.future(image())]
        wait_until(lambda: server.scheduler.active == 1)
        calls.append(stub.GenerateImage.future(image()))
        wait_until(lambda: server.scheduler.queued == 1)
        with pytest.raises(grpc.RpcError):
            stub.GenerateImage(image(), metadata=parent)
        engine.gate.set()
        for call in calls:
            call.result(20)
    found = {values(span)["nuwa.reason"]: span for span in spans if span.name == "call"}
    assert set(found) == {"INVALID_REQUEST", "NOT_FOUND", "QUEUE_FULL"}
    for reason, span in found.items():
        assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == SPAN
        assert (span.status.code, span.status.message) == (2, reason)
        assert values(span)["nuwa.method"].endswith("/GenerateImage")
    told = values(found["INVALID_REQUEST"])
    assert (told["nuwa.request_id"], told["nuwa.field"]) == ("one", "rank_by")
    assert values(found["NOT_FOUND"])["nuwa.model"] == "other"


def test_what_is_refused_before_its_handler_is_a_span_with_its_method(collected, tmp_path):
    endpoint, spans = collected
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[token]]\nname = "app"\ntoken = "a-token-for-apps-1"\nscopes = ["infer"]\n')
    with (
        Server(FakeEngine(), tokens=tokens, trace_endpoint=endpoint, max_streams=1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        methods = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            methods.GenerateImage(image())
        infer = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        end = threading.Event()
        access = [("authorization", "Bearer a-token-for-apps-1")]
        calls = [infer(iter(end.wait, True), metadata=access, timeout=20) for _ in range(2)]
        assert calls[1].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        end.set()
        assert list(calls[0]) == [], "it ends well, before the server does"
    told = [values(span) for span in spans if span.name == "call"]
    found = {each["nuwa.reason"]: each["nuwa.method"] for each in told}
    assert found == {
        "UNAUTHENTICATED": "/nuwa.v1.GenerationService/GenerateImage",
        "QUEUE_FULL": "/inference.GRPCInferenceService/ModelStreamInfer",
    }


def test_a_request_that_fails_has_no_second_span(collected):
    endpoint, spans = collected
    engine = FakeEngine()
    engine.step_error = RuntimeError("a fault")
    with (
        Server(engine, trace_endpoint=endpoint) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.GenerateImage(image())
    assert sorted(span.name for span in spans) == ["generate", "generate t2i", "queue"]


def test_an_answer_that_is_given_again_is_a_span(collected):
    endpoint, spans = collected
    with (
        Server(FakeEngine(), trace_endpoint=endpoint) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stub.GenerateImage(image(request_id="mine"))
        parent = [("traceparent", f"00-{TRACE}-{SPAN}-01")]
        stub.GenerateImage(image(request_id="mine"), metadata=parent)
    [again] = [span for span in spans if span.name == "again t2i"]
    assert again.trace_id.hex() == TRACE and again.status.code == 0
    assert again.start_time_unix_nano <= again.end_time_unix_nano
    assert values(again) == {
        "nuwa.request_id": "mine",
        "nuwa.model": "fake/1",
        "nuwa.task": "t2i",
        "nuwa.outcome": "kept",
    }


def test_a_collector_that_is_away_hinders_nobody():
    with (
        Server(FakeEngine(), trace_endpoint="http://127.0.0.1:1") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert stub.GenerateImage(image(), timeout=10).frame.data


@pytest.mark.parametrize("debug", [False, True])
def test_headers_that_are_no_traces_are_in_no_log_unless_asked_for(collected, caplog, debug):
    quiet, own = logging.getLogger("opentelemetry.trace"), logging.getLogger("nuwa.runtime")
    caplog.set_level(logging.NOTSET, quiet.name)
    caplog.set_level(logging.DEBUG if debug else logging.INFO, own.name)
    metadata = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "secret words of mine"))
    with (
        Server(FakeEngine(), trace_endpoint=collected[0]) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert stub.GenerateImage(image(request_id="mine"), metadata=metadata).frame.data
    assert ("secret words of mine" in caplog.text) == debug
    assert "mine t2i" in caplog.text


def test_what_is_missing_for_traces_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(UnavailableError, match=r"pip install 'nuwa-runtime\[tracing\]'"):
        Tracing("http://127.0.0.1:4317", "1")


def test_an_endpoint_is_a_url():
    with pytest.raises(ValueError, match="trace_endpoint"):
        Server(FakeEngine(), trace_endpoint="localhost:4317")
