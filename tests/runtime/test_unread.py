"""Answers that nobody takes, and requests that are over, do not pile up in the server."""

from __future__ import annotations

import gc
import threading
import tracemalloc

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nuwa.inference import grpc_service_pb2 as pb
from nuwa.inference import grpc_service_pb2_grpc
from nuwa.runtime.bench.scenarios import MOST_IN_FLIGHT
from nuwa.runtime.kserve.stream import UNSENT_ANSWERS
from nuwa.runtime.server import LEAST_STREAMS, Server

from .messages import wait_until
from .raw_http2 import MAX_CONCURRENT_STREAMS, REFUSED_STREAM, RawClient

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
LIVE = "/inference.GRPCInferenceService/ServerLive"
MODELS = "/nuwa.v1.ModelService/ListModels"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
MB = 2**20


@pytest.mark.parametrize("queue", [64, 1000])
def test_a_connection_has_as_many_calls_as_there_are_places(engine, queue):
    places = queue + 1 + 16 + 256 + 128 + 32 + 16 + 4 + 32
    with Server(engine, queue_size=queue) as server, RawClient(server.address) as client:
        announced = client.settings[MAX_CONCURRENT_STREAMS]
        assert announced == max(LEAST_STREAMS, places) > MOST_IN_FLIGHT


def test_answers_that_are_not_taken_are_bounded_in_each_connection(server):
    with RawClient(server.address) as client:
        calls = [client.call(CHECK) for _ in range(LEAST_STREAMS + 50)]
        wait_until(lambda: len(client.ended) == 50)
        assert client.ended == dict.fromkeys(calls[-50:], REFUSED_STREAM)


def test_a_client_with_more_calls_has_all_of_them_answered(channel):
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    for _ in range(3):
        calls = [health.Check.future(request, timeout=60) for _ in range(2 * LEAST_STREAMS)]
        codes = {call.code() for call in calls}
        # What the server has no thread for it says itself; nothing is lost on the way.
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("method", [CHECK, WATCH, LIVE, MODELS])
def test_a_client_that_does_not_take_an_answer_is_cut_off(engine, method, caplog):
    with (
        Server(engine, slow_reader_timeout=0.3) as server,
        RawClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream = client.call(method)
        wait_until(lambda: client.ended)
        assert set(client.ended) == {stream}
        assert f"{method}: its " in caplog.text and "cancelled, of ipv4:127.0.0.1:" in caplog.text
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status
        wait_until(lambda: not server._patience._waits)


def test_a_watch_that_is_taken_goes_on(engine):
    with (
        Server(engine, slow_reader_timeout=0.1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        threading.Event().wait(1.0)
        server._on_health(False)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


@pytest.fixture
def traced():
    """The bytes of Python's own that were taken since, in a function."""
    gc.collect()
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()


def requests_alive() -> int:
    """Large ones: parameters of other tests are none."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) is pb.ModelInferRequest]
    return sum(each.ByteSize() > MB // 2 for each in found)


BAD = {
    "id": pb.ModelInferRequest(model_name="fake_t2i", id="x" * MB),
    "model": pb.ModelInferRequest(model_name="x" * MB, id="mine"),
    "parameter": pb.ModelInferRequest(
        model_name="fake_t2i", id="mine", parameters={"x" * MB: pb.InferParameter(bool_param=True)}
    ),
    "nothing": pb.ModelInferRequest(
        model_name="fake_t2i", id="mine", raw_input_contents=[bytes(MB)]
    ),
}
BAD = {name: request.SerializeToString() for name, request in BAD.items()}
BAD["unreadable"] = b"\xff" * MB


@pytest.mark.parametrize("strict", [False, True], ids=["told", "strict"])
@pytest.mark.parametrize("what", BAD)
def test_failures_that_wait_keep_nothing_of_their_requests(server, what, strict, traced):
    many = 8
    metadata = (("triton_grpc_error", "true"),) if strict else ()
    with RawClient(server.address) as client:
        client.call(STREAM, [BAD[what]] * many, end=False, metadata=metadata)
        if strict:  # it ends with the first, whose status has no window to wait for
            client.call(CHECK)
            wait_until(lambda: not server._inference._streams)
        else:
            wait_until(lambda: len(server._inference._streams) == 1)
            [stream] = server._inference._streams
            wait_until(lambda: stream._queue.qsize() == many - 1 and stream._open == 1)
        client.call(CHECK)  # gRPC lets go of the last message with the next event
        wait_until(lambda: traced() < 2 * MB)
        wait_until(lambda: requests_alive() == 0)


def test_a_stream_whose_answers_wait_keeps_nothing_of_those_that_wait_to_be_told(server, traced):
    with RawClient(server.address) as client:
        client.call(STREAM, [BAD["model"]] * (UNSENT_ANSWERS + 8), end=False)
        wait_until(lambda: len(server._inference._streams) == 1)
        [stream] = server._inference._streams
        wait_until(lambda: stream._queue.full() and stream._open > 1)
        client.call(CHECK)
        wait_until(lambda: traced() < 2 * MB)
        wait_until(lambda: requests_alive() == 0)


def test_an_idle_stream_keeps_nothing_of_its_last_request(channel, traced):
    hold = threading.Event()
    sent = [BAD["nothing"]]

    def requests():
        yield sent.pop()
        hold.wait(20)

    call = channel.stream_stream(
        STREAM,
        request_serializer=bytes,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )(requests())
    assert next(call).error_message
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    wait_until(lambda: traced() < MB)
    wait_until(lambda: requests_alive() == 0)
    hold.set()


def test_the_log_has_a_failure_when_it_happens_and_once(server, caplog):
    caplog.set_level("INFO", "nuwa.runtime")
    metadata = (("triton_grpc_error", "true"),)
    with RawClient(server.address) as client:
        client.call(STREAM, [BAD["model"]], metadata=metadata)
        wait_until(lambda: not server._inference._streams and "NotFoundError" in caplog.text)
    assert sum("NotFoundError" in each.message for each in caplog.records) == 1
    counted = server.metrics.registry.get_sample_value
    assert counted("nuwa_errors_total", {"reason": "NOT_FOUND"}) == 1
