"""Calls that hold threads, whoever makes them, keep neither generations nor probes waiting."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nuwa.inference import grpc_service_pb2, grpc_service_pb2_grpc
from nuwa.runtime import lanes
from nuwa.runtime.lanes import SIZES, kind_of
from nuwa.runtime.logs import FIELDS
from nuwa.runtime.server import SLOW_READERS, Server
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .messages import details, image, wait_until

IMAGE = "/nuwa.v1.GenerationService/GenerateImage"
CHECK = "/grpc.health.v1.Health/Check"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


class Silent:
    """Requests of a call that never sends one."""

    def __init__(self) -> None:
        self._end = threading.Event()

    def __iter__(self) -> Silent:
        return self

    def __next__(self) -> None:
        self._end.wait(30)
        raise StopIteration

    def end(self) -> None:
        self._end.set()


@pytest.fixture
def silent():
    requests = Silent()
    yield requests
    requests.end()


def without_body(channel: grpc.Channel, method: str, silent: Silent) -> grpc.Future:
    """A call of one request, which is not sent."""
    return channel.stream_unary(method, request_serializer=bytes).future(silent, timeout=20)


def check(channel: grpc.Channel) -> int:
    return (
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2).status
    )


def test_calls_without_a_request_are_refused_beyond_their_number(
    server, channel, silent, monkeypatch
):
    monkeypatch.setattr(lanes, "SILENT_SECONDS", 60.0)
    room = 2 + 1 + SLOW_READERS
    calls = [without_body(channel, IMAGE, silent) for _ in range(room + 5)]
    wait_until(lambda: sum(call.done() for call in calls) == 5)
    refused = [call for call in calls if call.done()]
    assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert check(channel) == health_pb2.HealthCheckResponse.SERVING
    for call in calls:
        call.cancel()

    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    wait_until(lambda: answered(stub))


def test_calls_without_a_request_give_way(server, channel, silent, monkeypatch):
    monkeypatch.setattr(lanes, "SILENT_SECONDS", 60.0)
    room = 2 + 1 + SLOW_READERS
    calls = [without_body(channel, IMAGE, silent) for _ in range(room)]
    wait_until(lambda: len(server.intake._live) + len(server._patience._waits) == room)
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    assert not answered(stub), "they have only just come"
    monkeypatch.setattr(lanes, "SILENT_SECONDS", 0.1)
    time.sleep(0.2)
    assert answered(stub)
    lane = server._lanes._lanes["generations"]
    wait_until(lambda: any(call.done() for call in calls) and lane._open < room)
    assert all(answered(stub) for _ in range(2))
    ended = [call for call in calls if call.done()]
    assert [call.code() for call in ended] == [grpc.StatusCode.CANCELLED]
    for call in calls:
        call.cancel()


def answered(stub: generation_pb2_grpc.GenerationServiceStub) -> bool:
    try:
        return bool(stub.GenerateImage(image()).frame.data)
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("method", [IMAGE, CHECK, "/nuwa.v1.GenerationService/GenerateVideo"])
def test_a_request_has_to_come_in_time(engine, silent, method):
    with (
        Server(engine, slow_sender_timeout=0.3) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        started = time.monotonic()
        call = without_body(channel, method, silent)
        assert call.code() is grpc.StatusCode.CANCELLED
        assert 0.2 < time.monotonic() - started < 15


def test_a_call_that_ends_without_a_request_is_told_so(channel):
    call = channel.stream_unary(IMAGE).future(iter(()), timeout=5)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the call has no request" in call.details()


def test_idle_streams_leave_the_rest_alone(server, channel, stub, silent):
    check(channel)  # calls that wait for a connection may go out in any order
    infer = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
    streams = [
        infer.ModelStreamInfer(silent, timeout=20) for _ in range(server.settings.max_streams)
    ]
    told = [reflect.ServerReflectionInfo(silent, timeout=20) for _ in range(SIZES["reflections"])]
    extra = infer.ModelStreamInfer(silent, timeout=20)
    assert extra.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "streams" in extra.details()
    more = reflect.ServerReflectionInfo(silent, timeout=20)
    assert more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.GenerateImage(image()).frame.data
    assert infer.ServerReady(grpc_service_pb2.ServerReadyRequest()).ready
    for each in (*streams, *told):
        each.cancel()
    found = []

    def listed() -> bool:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        try:
            found[:] = reflect.ServerReflectionInfo(iter([request]), timeout=5)
        except grpc.RpcError:
            return False
        return True

    wait_until(listed)
    assert len(found[0].list_services_response.service) == 5


def test_loading_keeps_nobody_waiting(engine, tmp_path):
    release = threading.Event()

    def opening(path):
        release.wait(10)
        return engine

    with (
        Server(engine, open_engine=opening) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        server.host._paths["fake"] = tmp_path
        models = generation_pb2_grpc.ModelServiceStub(channel)
        request = pb.ReloadModelRequest(model="fake")
        loads = [models.ReloadModel.future(request) for _ in range(SIZES["loads"])]
        wait_until(lambda: refused(models, request))
        assert check(channel) == health_pb2.HealthCheckResponse.SERVING
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert stub.GenerateImage(image()).frame.data
        for load in loads:
            load.cancel()
        release.set()


def refused(models: generation_pb2_grpc.ModelServiceStub, request: pb.ReloadModelRequest) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        models.ReloadModel(request, timeout=0.5)
    return caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_full_queue_refuses_before_the_request_has_come(server, channel, stub, engine, silent):
    engine.gate.clear()
    running = stub.GenerateVideo(pb.GenerateVideoRequest(task=pb.TASK_T2V, prompt="a red 3 ."))
    assert next(running).HasField("accepted")
    waiting = [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.queued == 2)
    call = channel.stream_unary(IMAGE).future(silent, timeout=20)
    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, _ = details(call)
    assert info.reason == "QUEUE_FULL"
    assert dict(call.trailing_metadata())["grpc-retry-pushback-ms"].isdigit()
    assert server.metrics.registry.get_sample_value(
        "nuwa_requests_total", {"model": "fake", "task": "none", "outcome": "queue_full"}
    )
    engine.gate.set()
    assert all(each.result().frame.data for each in waiting)
    running.cancel()


def test_a_full_lane_is_counted_as_refused(server, channel, silent, monkeypatch):
    monkeypatch.setattr(lanes, "SILENT_SECONDS", 60.0)
    calls = [without_body(channel, IMAGE, silent) for _ in range(2 + 1 + SLOW_READERS + 3)]
    wait_until(lambda: sum(call.done() for call in calls) == 3)
    labels = {"model": "fake", "task": "none", "outcome": "queue_full"}
    assert server.metrics.registry.get_sample_value("nuwa_requests_total", labels) == 3
    for call in calls:
        call.cancel()


def test_what_a_full_lane_refuses_has_its_methods_name(server, channel, silent, caplog):
    caplog.set_level("DEBUG", "nuwa.runtime")
    check(channel)
    infer = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    number = server.settings.max_streams
    streams = [infer.ModelStreamInfer(silent, timeout=20) for _ in range(number + 1)]
    assert streams[-1].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for each in streams:
        each.cancel()
    server._refusals.tell()
    told = [getattr(record, FIELDS, {}) for record in caplog.records]
    [refusal] = [each for each in told if each.get("error_kind") == "QueueFullError"]
    [together] = [each for each in told if "refused" in each]
    assert refusal["method"] == STREAM and together["methods"] == {STREAM: 1}


def test_probes_without_a_request_make_room_soon(server, channel, silent):
    """Whoever fills their lane has it for a second."""
    calls = [without_body(channel, CHECK, silent) for _ in range(SIZES["probes"])]

    def answered_again() -> bool:
        try:
            return check(channel) == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError:
            return False

    wait_until(answered_again)
    wait_until(lambda: all(call.done() for call in calls))


def test_every_method_has_its_kind():
    for service, methods in (
        ("nuwa.v1.GenerationService", pb.DESCRIPTOR.services_by_name["GenerationService"].methods),
        ("nuwa.v1.ModelService", pb.DESCRIPTOR.services_by_name["ModelService"].methods),
        (
            "inference.GRPCInferenceService",
            grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods,
        ),
    ):
        kinds = {kind_of(f"/{service}/{method.name}"): method for method in methods}
        assert set(kinds) <= {"generations", "streams", *SIZES}
        for method in methods:
            generates = (
                method.name.startswith(("Generate", "Stream")) or method.name == "ModelInfer"
            )
            kind = kind_of(f"/{service}/{method.name}")
            assert generates == (kind == "generations"), method.name
    assert kind_of(CHECK) == "probes" and kind_of("/a.B/C") == lanes.OTHER
