"""Health, reflection, ports, signals and the end of a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nuwa.runtime.client import Client, ClientError
from nuwa.runtime.errors import DeviceLostError
from nuwa.runtime.server import MOST_CALLS, SERVICE, SLOW_READERS, Server, _most_calls
from nuwa.runtime.settings import ServerSettings
from nuwa.runtime.until_signal import serve_until_signal
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import (
    image,
    once,
    video,
)


def test_health_tells_of_the_service_and_of_the_drain(server, channel, engine, stub):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as failure:
        health.Check(health_pb2.HealthCheckRequest(service="nuwa.v1.Other"))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    engine.gate.clear()
    call = stub.GenerateVideo(video())
    assert next(call).HasField("accepted")
    stopper = threading.Thread(target=server.stop, args=(10,))
    stopper.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    engine.gate.set()
    assert list(call)[-1].HasField("done"), "a call at hand is finished within the grace"
    stopper.join(10)
    assert not stopper.is_alive()
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image(), timeout=5)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_server_whose_device_is_lost_says_so_and_ends(monkeypatch):
    engine = FakeEngine()

    def lose(until=None):
        raise DeviceLostError("GPU 0 is lost to this process")

    monkeypatch.setattr(engine, "step", lose)
    server, answers = Server(engine), []

    def ask():
        with grpc.insecure_channel(server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            try:
                stub.GenerateImage(image(), timeout=20, wait_for_ready=True)
            except grpc.RpcError as error:
                answers.append((error.code(), error.details()))

    client = threading.Thread(target=ask)
    client.start()
    serve_until_signal(server, grace=5)
    client.join(20)
    assert server.died
    ((code, details),) = answers
    assert code is grpc.StatusCode.UNAVAILABLE and "GPU 0 is lost to this process" in details


def test_a_stop_without_grace_ends_calls_as_unavailable(server, engine, stub):
    engine.gate.clear()
    call = stub.GenerateVideo(video())
    assert next(call).HasField("accepted")
    scheduler = server.scheduler
    once(lambda: scheduler._aborting, engine.gate.set)
    server.stop(0)
    with pytest.raises(grpc.RpcError) as failure:
        list(call)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert engine.allocated == {}


def test_reflection_describes_the_service(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    services, file = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in services.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    descriptor = descriptor_pb2.FileDescriptorProto()
    descriptor.ParseFromString(file.file_descriptor_response.file_descriptor_proto[0])
    methods = {method.name for service in descriptor.service for method in service.method}
    generation = {"GenerateImage", "StreamImage", "GenerateVideo", "GetModel"}
    assert methods == generation | {"ListModels", "ReloadModel", "UnloadModel"}


def test_a_port_is_had_once(server):
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(OSError, match="is the port taken"):
        Server(FakeEngine(), port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_absurd_ports(port):
    with pytest.raises(ValueError, match="port"):
        Server(FakeEngine(), port=port)


def test_listening_beyond_loopback_needs_a_word_and_is_warned_about(caplog):
    with pytest.raises(ValueError, match="is reached from other machines"):
        Server(FakeEngine(), host="0.0.0.0")
    with Server(FakeEngine(), host="0.0.0.0", insecure=True) as server:
        assert server.address.startswith("0.0.0.0:")
    assert "without encryption" in caplog.text


def test_metrics_beyond_loopback_are_warned_about(caplog):
    with Server(FakeEngine(), metrics_port=0):
        pass
    assert not caplog.records
    with Server(FakeEngine(), metrics_port=0, metrics_host="0.0.0.0") as server:
        assert server.metrics_address.startswith("0.0.0.0:")
    [record] = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "metrics and the status page on 0.0.0.0, without encryption" in record.message


def test_there_is_room_for_the_calls_of_every_bundle():
    def most(**fields) -> int:
        return _most_calls(ServerSettings(queue_size=64, slots=8, **fields))

    one = 64 + 8 + SLOW_READERS
    bundles = {f"m{n}": Path("b") for n in range(200)}
    assert most() == one, "an engine that was given is the only one"
    assert most(bundle=Path("b")) == 2 * one, "one version more, of a bundle that is loaded again"
    assert most(bundle=Path("b"), bundles={"a": Path("b"), "c": Path("d")}) == 4 * one
    assert most(bundles=bundles) == MOST_CALLS, "there are not thousands of threads"
    large = ServerSettings(queue_size=5000, bundles=bundles)
    assert _most_calls(large) == 5000 + 1 + SLOW_READERS, "unless one queue needs them"


RUN = """
import sys, threading
from tests.runtime.fake_engine import FakeEngine
from nuwa.runtime.server import Server
from nuwa.runtime.until_signal import serve_until_signal
engine = FakeEngine()
engine.gate.clear()
threading.Thread(target=lambda: (sys.stdin.readline(), engine.gate.set()), daemon=True).start()
serve_until_signal(Server(engine), load_seconds=1.5, grace=20)
print("over", flush=True)
"""


@pytest.fixture
def process():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", RUN]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(process, number):
    line = process.stdout.readline()
    assert line.startswith("nuwa: ready on 127.0.0.1:"), line
    assert "fake (t2i, i2i" in line and "loaded in 1.50 s" in line and line.endswith("MB\n")
    with Client(line.split()[3].rstrip(":")) as client:
        events = client.stream_video("t2v", "a 3", frame_count=2, seed=1)
        next(events)
        process.send_signal(number)
        time.sleep(0.2)
        process.stdin.write("go\n")
        process.stdin.flush()
        frames = [event for event in events if type(event).__name__ == "Frame"]
    assert len(frames) == 2
    assert process.stdout.readline() == "over\n"
    assert process.wait(10) == 0


def wait_for_drain(client):
    for _ in range(200):
        with pytest.raises(ClientError) as caught:
            client.generate_image("t2i", "a 3", deadline=0.3)
        if caught.value.code == grpc.StatusCode.UNAVAILABLE:
            return
    raise AssertionError("the server still takes requests")


def test_a_second_signal_cuts_the_drain(process):
    address = process.stdout.readline().split()[3].rstrip(":")
    with Client(address) as client:
        events = client.stream_video("t2v", "a 3", deadline=120)
        next(events)
        process.send_signal(signal.SIGTERM)
        wait_for_drain(client)  # two signals that wait for a busy process would count as one
        process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match="(?i)cancel|unavailable|shut"):
            list(events)
        process.stdin.write("go\n")
        process.stdin.flush()
    assert process.wait(10) == 0


def test_the_log_has_no_prompts(stub, caplog):
    caplog.set_level("DEBUG", "nuwa.runtime")
    stub.GenerateImage(pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="a private matter"))
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(pb.GenerateImageRequest(task=pb.TASK_I2I, prompt="a private matter"))
    assert "1 frames, 4 steps" in caplog.text and "private" not in caplog.text
