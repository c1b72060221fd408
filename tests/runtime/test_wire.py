"""Requests as bytes: what is refused before it is parsed, and what is not."""

from __future__ import annotations

import time
import tracemalloc

import grpc
import pytest

from nuwa.inference import grpc_service_pb2 as inference
from nuwa.inference import grpc_service_pb2_grpc
from nuwa.runtime.errors import FieldError
from nuwa.runtime.wire import MOST_FIELDS, MOST_PACKED, reader
from nuwa.v1 import generation_pb2 as pb

from .messages import details, image

read_image = reader(pb.GenerateImageRequest.FromString)
read_infer = reader(inference.ModelInferRequest.FromString)


def test_what_is_asked_for_is_read_as_it_is():
    boxes = [pb.Box(left=n, top=1, width=2, height=3) for n in range(256)]
    asked = image(mask=pb.Mask(boxes=pb.BoxList(boxes=boxes)), request_id="é" * 30_000)
    asked.image.encoded = bytes(range(256)) * 1000
    data = asked.SerializeToString()
    assert len(data) > 2 * MOST_FIELDS, "long enough to be looked at"
    assert read_image(data) == asked


def test_numbers_are_read_up_to_a_size():
    request = inference.ModelInferRequest(model_name="fake_s2i")
    contents = request.inputs.add(name="SKETCH", datatype="UINT8").contents
    contents.uint_contents.extend([1] * MOST_PACKED)
    assert read_infer(request.SerializeToString()) == request
    contents.uint_contents.append(1)
    with pytest.raises(FieldError, match=r"uint_contents has more than 1048576 bytes .* send them"):
        read_infer(request.SerializeToString())
    halves = request.SerializeToString()
    for _ in range(3):  # a field in pieces is put together
        more = inference.ModelInferRequest()
        more.inputs.add().contents.uint_contents.extend([1] * (MOST_PACKED // 2))
        halves += more.SerializeToString()
    with pytest.raises(FieldError, match=r"uint_contents has more than 1048576 bytes"):
        read_infer(halves)
    contents.Clear()
    contents.bytes_contents.append(bytes(2 * MOST_PACKED))
    assert read_infer(request.SerializeToString()) == request


BOMBS = {
    "submessages": b"\x2a\x00",  # inputs
    "inner submessages": b"\x2a\x02\x2a\x00",  # inputs[].contents
    "texts": b"\x3a\x00",  # raw_input_contents
    "unknown numbers": b"\xa0\x06\x01",
    "unknown groups": b"\xa3\x06\xa4\x06",
    "parameters": b"\x22\x03\x0a\x01a",
}


@pytest.mark.parametrize("part", BOMBS.values(), ids=BOMBS)
def test_many_fields_are_refused_in_little_time_and_memory(part):
    data = part * (4 * 2**20 // len(part))
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(FieldError, match="the request has more than 10000 fields") as caught:
        read_infer(data)
    assert time.process_time() - began < 1.0
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert caught.value.field == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 2**22,  # numbers without end
        b"\x08" + b"\xff" * 2**22,
        b"\x2a" + b"\xff" * 2**22,
        b"\xa0\x06" + b"\xff" * 2**22,
        b"\x2a\x80\x80\x80\x02" + b"\xff" * 2**22,  # in a submessage
        b"\x2a" + b"\xff" * 8 + b"\x01" + b"a" * 50_000,  # longer than the message
        b"\x0e" + b"a" * 50_000,  # of no wire type
        b"\x0a\xff\xff\x02" + b"\xff" * 49_151,  # not UTF-8
        b"\x09\x01" * 2,
        b"\x2a",
    ],
)
def test_what_is_no_message_is_refused_in_little_time(data):
    began = time.process_time()
    with pytest.raises(FieldError, match="is not a valid message") as caught:
        read_infer(data)
    assert time.process_time() - began < 1.0
    assert caught.value.field == ""


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelMetadata"])
def test_over_the_wire_it_is_an_error_of_the_call_and_the_server_goes_on(channel, method):
    path = f"/inference.GRPCInferenceService/{method}"
    bomb = BOMBS["submessages"] * 10**5
    if method == "ModelStreamInfer":
        form = inference.ModelStreamInferResponse
        call = channel.stream_stream(path, None, form.FromString)(iter([bomb, b"\x2a"]))
        told = [answer.error_message for answer in call]
        assert told[0] == "the request has more than 10000 fields"
        assert "not a valid message" in told[1] and len(told) == 2
    else:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(bomb)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        info, fields = details(caught.value)
        assert info.reason == "INVALID_REQUEST"
        assert fields == {"": "the request has more than 10000 fields"}
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    assert stub.ServerLive(inference.ServerLiveRequest()).live
