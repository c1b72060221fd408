"""The log as text and as JSON."""

from __future__ import annotations

import json
import logging

import grpc
import pytest

from nuwa.inference import grpc_service_pb2, grpc_service_pb2_grpc
from nuwa.runtime import logs
from nuwa.v1 import generation_pb2 as pb

from .messages import image


@pytest.fixture
def own_log():
    log = logging.getLogger("nuwa")
    before = log.handlers, log.propagate, log.level
    yield log
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def test_a_request_is_a_line_of_json_without_its_prompt(own_log, stub, capsys):
    logs.configure("json")
    stub.GenerateImage(image(request_id="mine"))
    with pytest.raises(grpc.RpcError):
        stub.GenerateImage(image(rank_by="x"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    done = next(line for line in lines if line.get("request_id") == "mine")
    assert (done["level"], done["task"], done["frames"], done["steps"]) == ("info", "t2i", 1, 4)
    assert done["total_seconds"] >= done["decode_seconds"] > 0
    assert done["time"].endswith("+00:00") and "mine t2i: 1 frames" in done["message"]
    refused = next(line for line in lines if "error_kind" in line)
    assert refused["error_kind"] == "FieldError" and refused["method"].endswith("GenerateImage")
    assert not any("a 3" in json.dumps(line) for line in lines)


def test_what_was_refused_can_be_found(own_log, stub, channel, capsys):
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


def test_errors_keep_their_traceback_in_one_line(own_log, capsys):
    logs.configure("json")
    try:
        raise RuntimeError("a fault\nof two lines")
    except RuntimeError:
        own_log.exception("it failed")
    [line] = capsys.readouterr().err.splitlines()
    assert "a fault\nof two lines" in json.loads(line)["error"]


def test_text_is_for_people(own_log, stub, capsys):
    logs.configure("text")
    stub.GenerateImage(image(request_id="mine"))
    assert " INFO mine t2i: 1 frames, 4 steps" in capsys.readouterr().err
