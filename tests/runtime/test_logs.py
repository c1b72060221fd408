"""The log as text and as JSON."""

from __future__ import annotations

import json
import logging

import grpc
import pytest

from nuwa.inference import grpc_service_pb2, grpc_service_pb2_grpc
from nuwa.runtime import logs
from nuwa.runtime.refusals import MOST_METHODS, Refusals
from nuwa.v1 import generation_pb2 as pb

from .messages import image, wait_until

IMAGE = "/nuwa.v1.GenerationService/GenerateImage"


def test_a_request_is_a_line_of_json_without_its_prompt(stub, capsys):
    logs.configure("json")
    stub.GenerateImage(image(request_id="mine"))
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(rank_by="x"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    done = next(line for line in lines if line.get("request_id") == "mine")
    assert (done["level"], done["task"], done["frames"], done["steps"]) == ("info", "t2i", 1, 4)
    assert done["model"] == "fake/1"
    assert done["total_seconds"] >= done["decode_seconds"] > 0
    assert done["time"].endswith("+00:00") and "mine t2i: 1 frames" in done["message"]
    refused = next(line for line in lines if "error_kind" in line)
    assert refused["error_kind"] == "FieldError" and refused["method"].endswith("GenerateImage")
    assert not any("a 3" in json.dumps(line) for line in lines)


def test_what_was_refused_can_be_found(stub, channel, capsys):
    logs.configure("json")
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(request_id="one", model="other"))
    with pytest.raises(grpc.RpcError):
        list(stub.StreamImage(pb.StreamImageRequest(image=image(request_id="two", rank_by="x"))))
    infer = grpc_service_pb2.ModelInferRequest(model_name="fake_t2i", id="three")
    stream = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    [answer] = stream.ModelStreamInfer(iter([infer]))
    assert answer.error_message
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    found = {line["request_id"]: line for line in lines if "error_kind" in line}
    assert set(found) == {"one", "two", "three"}
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in found.values())
    assert (found["one"]["model"], found["one"]["error_kind"]) == ("other", "NotFoundError")
    assert found["two"]["field"] == "image.rank_by"
    assert not any("a 3" in json.dumps(line) for line in lines)


def test_a_request_that_ends_without_a_result_has_its_model_in_its_line(stub, engine, capsys):
    logs.configure("json")
    engine.step_error = RuntimeError("a fault")
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(request_id="mine"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    [ended] = [line for line in lines if line.get("request_id") == "mine"]
    assert (ended["outcome"], ended["model"]) == ("engine", "fake/1")


def test_those_refused_by_a_full_queue_have_a_line_together(stub, server, engine, capsys):
    logs.configure("json")
    engine.gate.clear()
    calls = [stub.GenerateImage.future(image())]
    wait_until(lambda: server.scheduler.active == 1)
    calls += [stub.GenerateImage.future(image()) for _ in range(2)]
    wait_until(lambda: server.scheduler.queued == 2)
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            stub.GenerateImage(image(request_id="refused"))
    engine.gate.set()
    for call in calls:
        call.result(20)
    server.stop()  # which has the last ones told
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if "refused" in line]
    assert sum(line["refused"] for line in told) == sum(line["queue_full"] for line in told) == 3
    assert all(line["level"] == "warning" for line in told) and len(told) <= 2
    assert "requests refused in" in told[0]["message"]
    assert {method for line in told for method in line["methods"]} == {IMAGE}
    assert not any(line.get("request_id") == "refused" for line in lines)


def test_refusals_have_a_line_every_ten_seconds_at_most(caplog):
    clock = [100.0]
    refusals = Refusals(now=lambda: clock[0])
    refusals.tell()
    for reason in ("QUEUE_FULL", "INVALID_REQUEST", "QUEUE_FULL"):
        refusals.count(reason, "/a/B")
    clock[0] = 100.25
    refusals.tell()
    assert [record.message for record in caplog.records] == [
        "2 requests refused in 0.2 s: QUEUE_FULL 2; of /a/B 2"
    ]
    caplog.clear()
    clock[0] = 101.0
    for reason, method in (("DEADLINE_TOO_SHORT", "/a/B"), ("QUEUE_FULL", "/a/C")):
        refusals.count(reason, method)
    clock[0] = 110.0
    refusals.tell()
    assert caplog.records == [], "it is not time"
    clock[0] = 110.5
    refusals.tell()
    refusals.tell()
    [record] = caplog.records
    assert record.message == (
        "2 requests refused in 9.5 s: QUEUE_FULL 1, DEADLINE_TOO_SHORT 1; of /a/B 1, /a/C 1"
    )
    assert getattr(record, logs.FIELDS) == {
        "refused": 2,
        "seconds": 9.5,
        "queue_full": 1,
        "deadline_too_short": 1,
        "methods": {"/a/B": 1, "/a/C": 1},
    }
    clock[0] = 111.0
    refusals.count("QUEUE_FULL", "/a/B")
    refusals.tell()
    refusals.tell(last=True)
    assert caplog.records[-1].message == "1 requests refused in 0.0 s: QUEUE_FULL 1; of /a/B 1"


def test_a_line_of_refusals_names_so_many_methods_and_no_more(caplog):
    refusals = Refusals()
    for number in range(2 * MOST_METHODS):
        refusals.count("QUEUE_FULL", f"/any/{number}")
    refusals.count("QUEUE_FULL", "/any/0")
    refusals.tell()
    methods = getattr(caplog.records[0], logs.FIELDS)["methods"]
    assert len(methods) == MOST_METHODS + 1
    assert (methods["others"], methods["/any/0"]) == (MOST_METHODS, 2)


def test_errors_keep_their_traceback_in_one_line(capsys):
    logs.configure("json")
    try:
        raise RuntimeError("a fault\nof two lines")
    except RuntimeError:
        logging.getLogger("nuwa").exception("it failed")
    [line] = capsys.readouterr().err.splitlines()
    assert "a fault\nof two lines" in json.loads(line)["error"]


def test_text_is_for_people(stub, capsys):
    logs.configure("text")
    stub.GenerateImage(image(request_id="mine"))
    assert " INFO mine t2i: 1 frames, 4 steps" in capsys.readouterr().err
