"""A hanging engine is told of by health checks; clients that do not read are cut off."""

from __future__ import annotations

import threading

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nuwa.inference import grpc_service_pb2 as inference
from nuwa.runtime.pulse import Pulse
from nuwa.runtime.server import SERVICE, Server
from nuwa.runtime.watch import Watch
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import image, video, wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_pulse_tells_of_a_loop_that_does_not_come_round():
    clock = [0.0]
    pulse = Pulse(now=lambda: clock[0])
    pulse.has_work()
    clock[0] = 2.0
    pulse.has_work()
    assert pulse.longest() == 2.0
    pulse.comes_round()
    assert pulse.longest() == 0.0
    clock[0] = 3.0
    pulse.rests()
    clock[0] = 9.0
    assert pulse.longest() == 0.0, "there is nothing to do"


def test_a_pulse_tells_how_long_the_longest_call_has_lasted():
    clock, leave, entered = [0.0], threading.Event(), threading.Event()
    pulse = Pulse(now=lambda: clock[0])
    assert pulse.longest() == 0.0

    def call():
        with pulse.at_work():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=call)
    thread.start()
    entered.wait(20)
    clock[0] = 3.0
    with pulse.at_work():
        clock[0] = 5.0
        assert pulse.longest() == 5.0
        leave.set()
        thread.join()
        assert pulse.longest() == 2.0
    assert pulse.longest() == 0.0


def test_a_watch_tells_of_changes_once():
    seconds, told = [0.0], []
    watch = Watch(lambda: seconds[0], 10.0, told.append, lambda: None)
    for now in (0.0, 9.0, 11.0, 12.0, 0.5, 0.0, 30.0):
        seconds[0] = now
        watch.look()
    assert told == [False, True, False]
    watch.close()


@pytest.fixture
def engine():
    return FakeEngine(slots=2)


@pytest.fixture
def server(engine):
    with Server(engine, hang_timeout=0.2, slow_reader_timeout=2.0) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    return lambda name: stub.Check(health_pb2.HealthCheckRequest(service=name)).status


@pytest.mark.parametrize("where", ["step", "pixels", "prepare"])
def test_a_hanging_engine_is_not_serving_until_it_returns(
    where, engine, server, stub, health, monkeypatch
):
    gate, work = threading.Event(), getattr(engine, where)

    def hang(*arguments):
        assert gate.wait(20)
        return work(*arguments)

    monkeypatch.setattr(engine, where, hang)
    assert health(SERVICE) == health("") == SERVING
    call = stub.GenerateImage.future(image())
    wait_until(lambda: health(SERVICE) == health("") == NOT_SERVING)
    assert not call.done()
    gate.set()
    call.result(20)
    wait_until(lambda: health(SERVICE) == health("") == SERVING)


def test_a_loop_that_is_stuck_outside_the_engine_is_not_serving(server, stub, health, monkeypatch):
    gate, sweep = threading.Event(), server.scheduler._sweep

    def stuck():
        assert gate.wait(20)
        sweep()

    monkeypatch.setattr(server.scheduler, "_sweep", stuck)
    call = stub.GenerateImage.future(image())
    wait_until(lambda: health(SERVICE) == health("") == NOT_SERVING)
    gate.set()
    call.result(20)
    wait_until(lambda: health(SERVICE) == health("") == SERVING)


def test_an_idle_server_is_well(server, health):
    threading.Event().wait(0.8)
    assert health(SERVICE) == SERVING


def test_a_client_that_does_not_read_is_cut_off_and_others_are_not(server, engine, caplog):
    large = pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=8)  # 12 KiB a frame
    start = pb.Media(raw=pb.RawFrames(data=bytes(192), frame_count=1, height=8, width=8))
    request = pb.GenerateVideoRequest(task=pb.TASK_V2V, video=start, frame_count=1000, output=large)
    window = [("grpc.http2.lookahead_bytes", 65536), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.address, window) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        idle = stub.GenerateVideo(request)
        next(idle)
        other = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        reader = generation_pb2_grpc.GenerationServiceStub(other)
        assert sum(e.HasField("frame") for e in reader.GenerateVideo(video())) == 10
        wait_until(lambda: server.intake.open_calls == 0, 20)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in idle:
                pass
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert "its reader took nothing for 2 s: cancelled, of ipv4:127.0.0.1:" in caplog.text
        frames = [e for e in reader.GenerateVideo(video()) if e.HasField("frame")]
        assert len(frames) == 10
        other.close()
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)
    assert np.prod((1000, 64, 64, 3)) > 2**23, "more than gRPC's buffers hold"


@pytest.mark.parametrize("protocol", ["nuwa", "kserve"])
def test_nor_is_an_answer_in_one_message_kept_for_ever(protocol, server, engine, caplog):
    """gRPC itself would let go of such a call, and keep the answer, until its client reads."""
    if protocol == "nuwa":
        method, request = "/nuwa.v1.GenerationService/GenerateImage", image(sample_count=64)
        request.output.format, request.output.scale_factor = pb.IMAGE_FORMAT_RAW_RGB, 8
    else:
        method = "/inference.GRPCInferenceService/ModelInfer"
        request = inference.ModelInferRequest(model_name="fake_v2v")
        request.inputs.add(name="VIDEO", datatype="UINT8", shape=[1, 8, 8, 3])
        request.raw_input_contents.append(bytes(192))
        request.parameters["frame_count"].int64_param = 1000
    window = [  # which gRPC would enlarge
        ("grpc.http2.lookahead_bytes", 65536),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(server.address, window) as channel:
        ask = channel.unary_stream(method, type(request).SerializeToString, None)
        calls = [ask(request) for _ in range(3)]  # whose answers nobody takes
        lane = server._lanes._lanes["generations"]
        wait_until(lambda: lane._open == 3, 20)
        wait_until(lambda: lane._open == 0, 20)
        assert caplog.text.count("its reader took nothing for 2 s: cancelled") == 3
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert len(list(ask(request))) == 1, "to a client that reads it is one answer"
