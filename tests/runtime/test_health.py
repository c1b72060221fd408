"""Health checks: statuses, watchers that come and go, and that none can hold up the server."""

from __future__ import annotations

import contextlib
import gc
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nuwa.runtime.arrival import SMALL_BYTES
from nuwa.runtime.interceptor import MAX_MESSAGE_BYTES
from nuwa.runtime.server import KSERVE, SERVICE

from .messages import details, image, wait_until

STATUS = health_pb2.HealthCheckResponse


def request(service: str = SERVICE) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.fixture
def health(channel):
    return health_pb2_grpc.HealthStub(channel)


def test_watchers_hear_of_every_change_and_of_nothing_else(health, server):
    watches = {name: health.Watch(request(name)) for name in ("", SERVICE, KSERVE, "other")}
    firsts = {name: next(watch).status for name, watch in watches.items()}
    assert firsts == dict.fromkeys(("", SERVICE, KSERVE), STATUS.SERVING) | {
        "other": STATUS.SERVICE_UNKNOWN
    }
    server._on_health(True)
    server._on_health(False)
    for name in ("", SERVICE, KSERVE):
        assert next(watches[name]).status == STATUS.NOT_SERVING
    server._on_health(True)
    assert next(watches[SERVICE]).status == STATUS.SERVING
    for watch in watches.values():
        watch.cancel()


def test_a_list_has_all_that_check_knows(health, server, caplog):
    def listed() -> dict[str, int]:
        answer = health.List(health_pb2.HealthListRequest())
        return {name: each.status for name, each in answer.statuses.items()}

    assert listed() == dict.fromkeys(("", SERVICE, KSERVE), STATUS.SERVING)
    server._on_health(False)
    assert listed() == dict.fromkeys(("", SERVICE, KSERVE), STATUS.NOT_SERVING)
    assert not caplog.records


def test_a_watcher_that_leaves_makes_room(health, server, monkeypatch):
    watches = [health.Watch(request()) for _ in range(server.settings.max_watches)]
    for watch in watches:
        next(watch)
    with pytest.raises(grpc.RpcError) as caught:
        next(health.Watch(request()))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert health.Check(request()).status == STATUS.SERVING
    watches.pop().cancel()

    def another() -> bool:
        try:
            return next(health.Watch(request())).status == STATUS.SERVING
        except grpc.RpcError:
            return False

    wait_until(another)
    for watch in watches:
        watch.cancel()


def test_watchers_that_leave_at_every_change_hold_nobody_up(health, server, stub):
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            watch = health.Watch(request())
            with contextlib.suppress(grpc.RpcError):
                next(watch)
            watch.cancel()

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(200):
        server._on_health(number % 2 == 1)
    assert stub.GenerateImage(image(), timeout=20).frame.data
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_watch_ends_with_the_server_and_does_not_use_up_its_grace(health, server):
    watch = health.Watch(request())
    assert next(watch).status == STATUS.SERVING
    stopper = threading.Thread(target=server.stop, args=(20.0,))
    started = time.monotonic()
    stopper.start()
    assert next(watch).status == STATUS.NOT_SERVING
    assert list(watch) == []
    stopper.join(10)
    assert not stopper.is_alive() and time.monotonic() - started < 10


@pytest.mark.parametrize(
    "method",
    [f"grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch")]
    + [f"{KSERVE}/{name}" for name in ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady")]
    + ["grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"],
)
def test_probes_and_watches_that_are_not_small_are_refused_before_they_are_parsed(channel, method):
    call = channel.stream_stream(f"/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([b"\xff" * (SMALL_BYTES + 1)]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == (
        f"the request has {SMALL_BYTES + 1} bytes; those of /{method} have at most {SMALL_BYTES}"
    )
    assert details(caught.value)[0].reason == "INVALID_REQUEST"


def test_a_name_that_the_server_does_not_have_is_told_in_short(health):
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(request("\x85" * ((SMALL_BYTES - 3) // 2)))  # as long as it may be
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    told = caught.value.details()
    assert told.startswith("there is no service '\\x85") and told.endswith("...")
    assert len(told.encode()) <= MAX_MESSAGE_BYTES


def test_a_watch_keeps_nothing_of_its_request_but_the_name(channel):
    method = "/grpc.health.v1.Health/Watch"
    watch = channel.unary_stream(method, response_deserializer=STATUS.FromString)
    calls = [watch(request("other").SerializeToString()) for _ in range(4)]
    assert {next(call).status for call in calls} == {STATUS.SERVICE_UNKNOWN}
    gc.collect()
    assert not any(type(each) is health_pb2.HealthCheckRequest for each in gc.get_objects())
    for call in calls:
        call.cancel()
