"""Cancelled calls, deadlines, full queues and readers that do not read."""

from __future__ import annotations

import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from nuwa.runtime import media
from nuwa.runtime.core import CancelledError, Done, Frame, GenerationRequest
from nuwa.runtime.scheduler import Scheduler
from nuwa.runtime.server import SERVICE, Server
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import (
    details,
    image,
    video,
    wait_until,
    wait_until_told_to_cancel,
)


def test_cancelling_mid_stream_frees_the_slot(stub, engine, server):
    engine.gate.clear()
    call = stub.GenerateVideo(video())
    assert next(call).HasField("accepted")
    call.cancel()
    with pytest.raises(grpc.RpcError):
        next(call)
    wait_until_told_to_cancel(server)
    engine.gate.set()
    wait_until(lambda: server.scheduler.active == 0)
    wait_until(lambda: engine.allocated == {})
    assert engine.steps <= 2
    assert len(list(stub.GenerateVideo(video(frame_count=1)))) == 7


def test_a_closed_connection_frees_the_slot(engine, server):
    engine.gate.clear()
    channel = grpc.insecure_channel(server.address)
    call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateVideo(video())
    assert next(call).HasField("accepted")
    channel.close()
    wait_until_told_to_cancel(server)
    engine.gate.set()
    wait_until(lambda: server.scheduler.active == 0)
    assert engine.steps <= 2


def test_cancelling_while_queued(stub, engine, server):
    engine.gate.clear()
    running = stub.GenerateVideo(video(frame_count=1))
    assert next(running).HasField("accepted")
    waiting = stub.GenerateImage.future(image())
    wait_until(lambda: server.scheduler.queued == 1)
    waiting.cancel()
    wait_until(lambda: server.scheduler.queued == 0)
    engine.gate.set()
    assert list(running)[-1].HasField("done")


@pytest.mark.parametrize("busy", [False, True], ids=["running", "queued"])
def test_a_deadline_ends_the_work(stub, engine, server, busy):
    engine.gate.clear()
    other = stub.GenerateVideo(video()) if busy else None
    if other:
        assert next(other).HasField("accepted")
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image(), timeout=0.2)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.gate.set()
    wait_until(lambda: server.scheduler.queued == 0)
    if other:
        assert list(other)[-1].HasField("done")
    wait_until(lambda: server.scheduler.active == 0)


def test_a_full_queue_says_when_to_come_back(stub, engine, server):
    engine.gate.clear()
    running = stub.GenerateVideo(video(frame_count=1))
    assert next(running).HasField("accepted")
    waiting = [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.queued == 2)
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image())
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, _ = details(failure.value)
    assert info.reason == "QUEUE_FULL"
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(failure.value).details)
    assert retry.retry_delay.ToMilliseconds() == 100
    engine.gate.set()
    assert all(call.result().frame.data for call in waiting)


def test_readers_that_never_read_do_not_use_up_the_server(engine):
    """18 calls may be open (1 waits, 1 runs, 16 slow). 30 ask for 9 MB each and read nothing."""
    pixels = engine.pixels
    engine.pixels = lambda tokens: media.upscale(media.upscale(pixels(tokens), 8), 2)
    output = pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=8)
    request = video(frame_count=3, output=output)
    with Server(engine, queue_size=1) as server, grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        calls = []
        for _ in range(30):
            calls.append(stub.GenerateVideo(request))
            time.sleep(0.01)
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        codes = []
        for call in calls:
            try:
                list(call)
            except grpc.RpcError as error:
                codes.append(error.code())
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert 30 - 18 <= len(codes) < 30
        assert list(stub.GenerateVideo(request))[-1].HasField("done")


def test_a_reader_that_is_far_behind_is_cut_off():
    scheduler = Scheduler(FakeEngine())
    one = 3 * 8 * 8  # bytes of a frame
    handle = scheduler.submit(clip_request(10), most_unread=4 * one)
    other = scheduler.submit(clip_request(10), most_unread=10 * one)
    while scheduler.active or scheduler.queued:
        scheduler.turn()
    frames = []
    with pytest.raises(CancelledError, match="wait for a reader that is too slow"):
        for event in handle.events():
            if isinstance(event, Frame):
                frames.append(event)
    assert len(frames) == 4 and len(other.result()[0]) == 10
    scheduler.close()


def test_a_reader_that_keeps_up_may_have_as_many_frames_as_it_likes():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(clip_request(10), most_unread=2 * 3 * 8 * 8)
    events = handle.events()
    frames, done = 0, False
    while not done:
        scheduler.turn()
        while not (done or handle._events.empty()):
            event = next(events)
            frames += isinstance(event, Frame)
            done = isinstance(event, Done)
    assert frames == 10
    scheduler.close()


def clip_request(frames: int) -> GenerationRequest:
    return GenerationRequest(Task.T2V, "a 3", frame_count=frames)


def test_the_decode_thread_does_not_wait_for_readers(stub, server):
    call = stub.GenerateVideo(
        video(output=pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=8, include_tokens=True))
    )
    wait_until(lambda: server.scheduler.engine.steps == 40)
    wait_until(lambda: server.scheduler.active == 0)
    assert sum(event.HasField("frame") for event in call) == 10
