"""A request that is sent again: kept answers, followers of one that is being made, retries."""

from __future__ import annotations

import threading
import time

import grpc
import pytest

from nuwa.runtime import admission
from nuwa.runtime.answers import MOST_FOLLOWERS, Answers
from nuwa.runtime.client import Client, ClientError
from nuwa.runtime.core import CancelledError, QueueFullError
from nuwa.runtime.logs import FIELDS
from nuwa.runtime.server import Server
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import details, image, once, video, wait_until

A, B, C = b"a", b"b", b"c"


def always() -> bool:
    return True


class Maker:
    """Makes answers of 1000 bytes and more, about their numbers; fails where it is told to."""

    def __init__(self) -> None:
        self.made = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self) -> tuple[pb.GenerateImageResponse, str]:
        self.made += 1
        number = self.made
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        frame = pb.Frame(data=bytes(1000))
        return pb.GenerateImageResponse(seed=number, frame=frame), f"number {number}"


def test_an_answer_is_made_once_for_each_key_while_it_is_young():
    clock, make = [0.0], Maker()
    answers = Answers(seconds=10.0, now=lambda: clock[0])
    assert [answers.once(key, make, always).seed for key in (A, A, B, A)] == [1, 1, 2, 1]
    clock[0] = 10.5
    assert [answers.once(key, make, always).seed for key in (A, B, A)] == [3, 4, 3]


def test_who_gives_an_answer_again_is_told_what_it_is_about():
    make, answers, told = Maker(), Answers(), []
    for key in (A, B, A, A, B):
        answers.once(key, make, always, told.append)
    assert told == ["number 1", "number 1", "number 2"]


def test_the_oldest_answers_give_way_when_they_are_too_large():
    make = Maker()
    answers = Answers(most_bytes=2500)
    assert [answers.once(key, make, always).seed for key in (A, B, C)] == [1, 2, 3]
    assert [answers.once(key, make, always).seed for key in (C, B, A)] == [3, 2, 4]
    assert answers._bytes <= 2500
    tiny = Answers(most_bytes=10)
    assert [tiny.once(A, make, always).seed for _ in range(2)] == [5, 6] and tiny._bytes == 0


def test_failures_are_not_kept():
    make, answers = Maker(), Answers()
    make.error = ValueError("wrong")
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            answers.once(A, make, always)
    make.error = None
    assert answers.once(A, make, always).seed == 3


def test_who_comes_while_it_is_made_waits_for_it():
    make, answers, found = Maker(), Answers(), []
    make.gate.clear()
    threads = [
        threading.Thread(target=lambda: found.append(answers.once(A, make, always).seed))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: make.made == 1)
    with pytest.raises(CancelledError):
        answers.once(A, make, lambda: False)
    make.gate.set()
    for thread in threads:
        thread.join(20)
    assert found == [1] * 4 and make.made == 1


def test_a_follower_makes_its_own_when_the_first_one_fails():
    answers, first, second = Answers(), Maker(), Maker()
    first.gate.clear()
    first.error = CancelledError("its client left")
    failed = []

    def lead():
        try:
            answers.once(A, first, always)
        except CancelledError as error:
            failed.append(error)

    leader = threading.Thread(target=lead)
    leader.start()
    wait_until(lambda: first.made == 1)
    threading.Timer(0.1, first.gate.set).start()
    assert answers.once(A, second, always).seed == 1 and second.made == 1
    leader.join(20)
    assert len(failed) == 1


def test_so_many_wait_for_one_answer_and_no_more():
    make, answers, found, left = Maker(), Answers(), [], threading.Event()
    make.gate.clear()

    def follow(wanted):
        try:
            found.append(answers.once(A, make, wanted).seed)
        except CancelledError:
            found.append(0)

    def begin(wanted):
        thread = threading.Thread(target=follow, args=(wanted,))
        thread.start()
        return thread

    threads = [begin(always)]
    wait_until(lambda: make.made == 1)
    threads += [begin(lambda: not left.is_set()) for _ in range(MOST_FOLLOWERS)]
    wait_until(lambda: answers._answers[A].followers == MOST_FOLLOWERS)
    with pytest.raises(QueueFullError, match="8 calls with this very request wait"):
        answers.once(A, make, always)
    left.set()  # who leaves makes room
    wait_until(lambda: answers._answers[A].followers == 0)
    threads.append(begin(always))
    wait_until(lambda: answers._answers[A].followers == 1)
    make.gate.set()
    for thread in threads:
        thread.join(20)
    assert sorted(found) == [0] * MOST_FOLLOWERS + [1, 1] and make.made == 1


def test_who_sends_one_request_very_often_is_told_that_it_is_being_made(stub, engine, server):
    engine.gate.clear()
    first = stub.GenerateImage.future(image(request_id="one"))
    wait_until(lambda: server.scheduler.active == 1)
    followers = [stub.GenerateImage.future(image(request_id="one")) for _ in range(MOST_FOLLOWERS)]
    [answer] = server.intake.answers._answers.values()
    wait_until(lambda: answer.followers == MOST_FOLLOWERS)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateImage(image(request_id="one"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)[0].reason == "QUEUE_FULL"
    assert "wait for its answer already" in caught.value.details()
    engine.gate.set()
    assert all(each.result(20) == first.result(20) for each in followers)
    assert stub.GenerateImage(image(request_id="one")) == first.result() and not answer.followers
    assert len(engine.admitted) == 1


def test_a_request_that_is_sent_again_is_not_generated_again(stub, engine):
    first = stub.GenerateImage(image(request_id="one"))
    assert stub.GenerateImage(image(request_id="one")) == first
    assert len(engine.admitted) == 1
    stub.GenerateImage(image(request_id="two"))
    stub.GenerateImage(image(request_id="one", output=pb.Output(scale_factor=2)))
    assert len(engine.admitted) == 3
    stub.GenerateImage(image())
    stub.GenerateImage(image())
    assert len(engine.admitted) == 5


def test_answers_that_are_given_again_are_counted_and_in_the_log(stub, server, caplog):
    caplog.set_level("INFO", "nuwa.runtime")
    for _ in range(3):
        stub.GenerateImage(image(request_id="one"))

    def read(name: str, **labels: str) -> float | None:
        labels = {"model": "fake", "task": "t2i", **labels}
        return server.metrics.registry.get_sample_value(name, labels)

    assert read("nuwa_requests_total", outcome="kept") == 2
    assert read("nuwa_requests_total", outcome="ok") == 1
    for phase in ("request", "queue", "encode", "decode", "pixels"):
        assert read(f"nuwa_{phase}_duration_seconds_count") == 1
    told = [getattr(record, FIELDS, {}) for record in caplog.records]
    told = [each for each in told if each.get("outcome") == "kept"]
    assert [each.pop("total_seconds") >= 0 for each in told] == [True, True]
    one = {"request_id": "one", "model": "fake/1", "task": "t2i", "outcome": "kept"}
    assert told == [one, one]


def test_a_retry_while_the_first_try_runs_gets_its_answer(stub, engine, server):
    engine.gate.clear()
    calls = [stub.GenerateImage.future(image(request_id="one")) for _ in range(3)]
    wait_until(lambda: server.scheduler.active == 1)
    calls[0].cancel()  # or a follower, whichever: the others get an answer all the same
    engine.gate.set()
    assert calls[1].result(20) == calls[2].result(20)
    assert len(engine.admitted) <= 2
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)


def test_a_kept_answer_is_given_although_the_server_is_full(stub, engine, server):
    first = stub.GenerateImage(image(request_id="one"))
    calls = full(engine, server)
    assert stub.GenerateImage(image(request_id="one")) == first
    engine.gate.set()
    for call in calls[1:]:
        call.result(20)


def test_a_server_that_started_anew_gives_the_same_result():
    found = []
    for _ in range(2):
        with (
            Server(FakeEngine()) as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            answer = stub.GenerateImage(image(request_id="one"))
            clip = list(stub.GenerateVideo(video(request_id="one", frame_count=2)))
            frames = [each.frame.frame.data for each in clip if each.HasField("frame")]
            found.append((answer.seed, answer.frame, frames))
            assert stub.GenerateImage(image(request_id="other")).seed != answer.seed
    assert found[0] == found[1]


def full(engine, server) -> list:
    """Calls that fill the server: one running, two waiting."""
    engine.gate.clear()
    channel = grpc.insecure_channel(server.address)
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    first = stub.GenerateImage.future(image())
    wait_until(lambda: server.scheduler.active == 1)
    waiting = [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.queued == 2)
    return [channel, first, *waiting]


def refused(server: Server) -> float:
    """Calls for which the queue was full."""
    labels = {"model": "fake", "task": "none", "outcome": "queue_full"}
    return server.metrics.registry.get_sample_value("nuwa_requests_total", labels) or 0.0


def test_a_full_server_says_when_to_come_back(stub, engine, server):
    calls = full(engine, server)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateImage(image())
    trailers = dict(caught.value.trailing_metadata())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers["grpc-retry-pushback-ms"] == "100"
    engine.gate.set()
    for call in calls[1:]:
        call.result(20)


def test_the_client_comes_back_when_it_is_told_to(engine, server, monkeypatch):
    monkeypatch.setattr(admission, "LEAST_RETRY", 0.3)
    calls = full(engine, server)
    with Client(server.address, attempts=1) as impatient, pytest.raises(ClientError) as caught:
        impatient.generate_image("t2i", "a 3")
    assert caught.value.reason == "QUEUE_FULL"
    started, before = time.monotonic(), refused(server)
    once(lambda: refused(server) > before, engine.gate.set)
    with Client(server.address) as client:
        assert client.generate_image("t2i", "a 3", seed=1).seed == 1
        assert time.monotonic() - started > 0.25
        assert len(client.generate_video("t2v", "a 3", frame_count=2).frames) == 2
    for call in calls[1:]:
        call.result(20)


@pytest.mark.parametrize("attempts", [0, 6])
def test_attempts_are_as_many_as_grpc_makes(attempts):
    with pytest.raises(ValueError, match=rf"attempts {attempts} is not in \[1, 5\]"):
        Client("127.0.0.1:1", attempts=attempts)
