"""The real gRPC server on a loopback port over the fake engine: promises, faults, life after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from nuwa.runtime import media
from nuwa.runtime.client import Client
from nuwa.runtime.server import SERVICE, Server
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine, expected_pixels, expected_tokens


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def server(engine):
    with Server(engine, queue_size=2) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address, [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return generation_pb2_grpc.GenerationServiceStub(channel)


def video(**fields) -> pb.GenerateVideoRequest:
    return pb.GenerateVideoRequest(task=pb.TASK_T2V, prompt="a 3 moves left", **fields)


def image(**fields) -> pb.GenerateImageRequest:
    return pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="a 3", **fields)


def details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo, dict[str, str]]:
    """ErrorInfo, and the fields of BadRequest."""
    info, fields = error_details_pb2.ErrorInfo(), {}
    for detail in rpc_status.from_call(error).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields = {each.field: each.description for each in bad.field_violations}
        detail.Unpack(info)
    return info, fields


def wait_until_told_to_cancel(server: Server) -> None:
    """The server heard of the client's leaving; the decode thread may not have."""
    wait_until(lambda: all(each.handle.cancelled for each in server.scheduler._running.values()))


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


# What works.


def test_an_image(stub):
    request = image(
        request_id="mine",
        sampling=pb.Sampling(seed=300),
        output=pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, include_tokens=True),
    )
    response = stub.GenerateImage(request)
    tokens = expected_tokens(300, 0)
    assert response.frame.data == expected_pixels(tokens).tobytes()
    assert list(response.frame.token_grid.tokens) == tokens.flatten().tolist()
    assert (response.request_id, response.seed) == ("mine", 300)
    assert (response.frame.height, response.frame.width) == (8, 8)
    assert response.timings.step_count == 4
    assert response.timings.total_duration.ToNanoseconds() > 0


@pytest.mark.parametrize(
    ("kind", "magic"),
    [
        (pb.IMAGE_FORMAT_UNSPECIFIED, b"\x89PNG"),
        (pb.IMAGE_FORMAT_PNG, b"\x89PNG"),
        (pb.IMAGE_FORMAT_WEBP, b"RIFF"),
        (pb.IMAGE_FORMAT_GIF, b"GIF8"),
    ],
)
def test_an_image_in_each_format_scaled(stub, kind, magic):
    output = pb.Output(format=kind, scale_factor=3)
    frame = stub.GenerateImage(image(sampling=pb.Sampling(seed=1), output=output)).frame
    assert frame.data.startswith(magic) and frame.format != pb.IMAGE_FORMAT_UNSPECIFIED
    assert not frame.HasField("token_grid")
    expected = media.upscale(expected_pixels(expected_tokens(1, 0)), 3)
    np.testing.assert_array_equal(media.decode_clip(frame.data)[0], expected)
    assert (frame.height, frame.width) == (24, 24)


def test_a_clip_streams_its_events_in_order(stub):
    request = video(frame_count=3, sampling=pb.Sampling(seed=5), request_id="r")
    events = list(stub.GenerateVideo(request))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["accepted", *(["progress"] * 4 + ["frame"]) * 3, "done"]
    assert (events[0].accepted.seed, events[0].accepted.frame_count) == (5, 3)
    assert events[0].accepted.request_id == events[-1].done.request_id == "r"
    frames = [event.frame.frame for event in events if event.WhichOneof("event") == "frame"]
    for index, frame in enumerate(frames):
        assert frame.index == index
        expected = expected_pixels(expected_tokens(5, index))
        np.testing.assert_array_equal(media.decode_clip(frame.data)[0], expected)
    last = events[-2 - 1].progress
    assert (last.decoded_position_count, last.total_position_count) == (48, 48)
    assert (last.decoded_frame_count, last.total_frame_count) == (3, 3)
    assert events[-1].done.timings.step_count == 12 and events[-1].done.animation == b""


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_a_clip_as_one_file(stub, kind):
    request = video(
        frame_count=2,
        sampling=pb.Sampling(seed=5),
        animation_format=pb.AnimationFormat.Value(f"ANIMATION_FORMAT_{kind}"),
        frames_per_second=5,
        output=pb.Output(scale_factor=2),
    )
    done = list(stub.GenerateVideo(request))[-1].done
    expected = np.stack([expected_pixels(expected_tokens(5, index)) for index in range(2)])
    np.testing.assert_array_equal(media.decode_clip(done.animation), media.upscale(expected, 2))
    assert done.animation_format == request.animation_format


def test_an_unset_seed_is_random_and_reported(stub):
    request = image(output=pb.Output(include_tokens=True))
    first, second = stub.GenerateImage(request), stub.GenerateImage(request)
    assert first.seed != second.seed and first.request_id != second.request_id
    again = stub.GenerateImage(image(sampling=pb.Sampling(seed=first.seed), output=request.output))
    assert again.frame == first.frame


def test_a_clip_has_the_models_length_unless_told(stub):
    assert sum(e.HasField("frame") for e in stub.GenerateVideo(video())) == 10


def test_get_model(stub):
    model = stub.GetModel(pb.GetModelRequest()).model
    assert model.name == "fake" and model.parameter_count == 3_000_000_000
    assert pb.TASK_S2I not in model.tasks and pb.TASK_T2V in model.tasks
    assert (model.height, model.width, model.max_frame_count, model.slot_count) == (8, 8, 10, 1)


PICTURE = np.full((8, 8, 3), 9, np.uint8)
CLIP = np.stack([PICTURE] * 3)
MAPS = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)


def test_what_is_given_reaches_the_engine(stub, engine):
    encoded = pb.Media(encoded=media.encode_picture(PICTURE, "png"))
    raw_clip = pb.Media(raw=pb.RawFrames(data=CLIP.tobytes(), frame_count=3, height=8, width=8))
    raw_maps = pb.Media(raw=pb.RawFrames(data=MAPS.tobytes(), frame_count=3, height=8, width=8))
    boxes = pb.Mask(
        boxes=pb.BoxList(
            boxes=[
                pb.Box(left=0, top=1, width=2, height=3),
                pb.Box(left=7, top=7, width=1, height=1),
            ]
        )
    )
    half = np.zeros((8, 8, 3), np.uint8)
    half[4:] = 255
    stub.GenerateImage(
        pb.GenerateImageRequest(
            task=pb.TASK_TI2I,
            prompt="a 4",
            image=encoded,
            mask=boxes,
            schedule=pb.SCHEDULE_RASTER,
            sampling=pb.Sampling(
                temperature=0,
                top_k=7,
                top_p=0.9,
                guidance_scale=3.5,
                seed=2**63 - 1,
                sample_index=4,
            ),
        )
    )
    requests = [
        pb.GenerateVideoRequest(task=pb.TASK_S2V, sketch=raw_maps),
        pb.GenerateVideoRequest(task=pb.TASK_V2V, video=raw_clip, frame_count=5),
        pb.GenerateVideoRequest(
            task=pb.TASK_TV2V,
            prompt="a 5",
            video=raw_clip,
            mask=pb.Mask(picture=pb.Media(encoded=media.encode_picture(half, "png"))),
        ),
    ]
    for request in requests:
        assert list(stub.GenerateVideo(request))[-1].HasField("done")
    edit, sketch, prediction, manipulation = engine.admitted
    np.testing.assert_array_equal(edit.frames, PICTURE[None])
    assert edit.mask.sum() == 7 and edit.mask[1:4, 0:2].all() and edit.mask[7, 7]
    knobs = edit.sampling
    assert (knobs.temperature, knobs.top_k, knobs.top_p, knobs.guidance_scale) == (0, 7, 0.9, 3.5)
    assert (edit.seed, edit.sample_index, edit.schedule) == (2**63 - 1, 4, "raster")
    np.testing.assert_array_equal(sketch.sketch, MAPS)
    assert (sketch.frame_count, prediction.frame_count, manipulation.frame_count) == (3, 5, 3)
    np.testing.assert_array_equal(prediction.frames, CLIP)
    assert prediction.mask is None and sketch.frames is None and edit.sketch is None
    assert manipulation.mask[4:].all() and not manipulation.mask[:4].any()


# What is refused, and that nothing of it hurts the next call.


def raw(frames: int, height: int, width: int, size: int | None = None) -> pb.Media:
    data = bytes(frames * height * width * 3 if size is None else size)
    return pb.Media(raw=pb.RawFrames(data=data, frame_count=frames, height=height, width=width))


def i2i(**fields) -> pb.GenerateImageRequest:
    fields.setdefault("image", raw(1, 8, 8))
    fields.setdefault("mask", one_box(0, 0, 4, 4))
    return pb.GenerateImageRequest(task=pb.TASK_I2I, **fields)


def one_box(left: int, top: int, width: int, height: int) -> pb.Mask:
    box = pb.Box(left=left, top=top, width=width, height=height)
    return pb.Mask(boxes=pb.BoxList(boxes=[box]))


def sampled(**knobs) -> pb.GenerateImageRequest:
    return image(sampling=pb.Sampling(**knobs))


def with_unknown(message, field: bytes):
    message.MergeFromString(field)
    return message


NAN, INFINITY = float("nan"), float("inf")
BAD_IMAGES = {
    "task unset": (pb.GenerateImageRequest(prompt="a"), "task", "not set; choose one of T2I"),
    "task unknown": (pb.GenerateImageRequest(task=99), "task", "task 99 is unknown"),
    "task of clips": (pb.GenerateImageRequest(task=pb.TASK_T2V), "task", "for GenerateVideo"),
    "prompt empty": (pb.GenerateImageRequest(task=pb.TASK_T2I), "prompt", "prompt is empty"),
    "prompt blank": (pb.GenerateImageRequest(task=pb.TASK_T2I, prompt=" \n"), "prompt", "empty"),
    "prompt 4097": (
        pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="a" * 4097),
        "prompt",
        "prompt is 4097 bytes of UTF-8; the limit is 4096",
    ),
    "prompt 10 MB": (
        pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="ü" * 5_000_000),
        "prompt",
        "prompt is 10000000 bytes of UTF-8; the limit is 4096",
    ),
    "prompt for i2i": (i2i(prompt="a 3"), "prompt", "takes no prompt"),
    "request id long": (image(request_id="x" * 129), "request_id", "printable"),
    "request id control": (image(request_id="a\nb"), "request_id", "printable"),
    "image for t2i": (image(image=raw(1, 8, 8)), "image", "T2I takes no image"),
    "mask for t2i": (image(mask=one_box(0, 0, 1, 1)), "mask", "takes no mask"),
    "sketch for t2i": (image(sketch=raw(1, 8, 8)), "sketch", "takes no sketch"),
    "image missing": (
        pb.GenerateImageRequest(task=pb.TASK_I2I, mask=one_box(0, 0, 1, 1)),
        "image",
        "image is missing",
    ),
    "mask missing": (
        pb.GenerateImageRequest(task=pb.TASK_I2I, image=raw(1, 8, 8)),
        "mask",
        "missing",
    ),
    "image empty": (i2i(image=pb.Media()), "image", "neither encoded nor raw"),
    "image no bytes": (i2i(image=pb.Media(encoded=b"")), "image.encoded", "image is empty"),
    "image of text": (i2i(image=pb.Media(encoded=b"hello")), "image.encoded", "is not a PNG"),
    "image cut": (
        i2i(image=pb.Media(encoded=media.encode_picture(PICTURE, "png")[:-30])),
        "image.encoded",
        "cut off",
    ),
    "image too long": (
        i2i(image=pb.Media(encoded=bytes(9 * 2**20))),
        "image.encoded",
        "image is 9437184 bytes long; the limit is 8388608",
    ),
    "image too large": (
        i2i(
            image=pb.Media(encoded=media.encode_picture(np.zeros((4200, 4200, 3), np.uint8), "png"))
        ),
        "image.encoded",
        "the limit is 16777216",
    ),
    "image of another size": (
        i2i(image=raw(1, 4, 8)),
        "image",
        "8 x 4 pixels; this model takes 8 x 8",
    ),
    "image animated": (
        i2i(image=pb.Media(encoded=media.encode_animation(CLIP, "webp"))),
        "image",
        "has 3 frames; task I2I takes one",
    ),
    "raw short": (
        i2i(image=raw(1, 8, 8, 191)),
        "image.raw.data",
        "is 191 bytes; 1 x 8 x 8 x 3 are 192",
    ),
    "raw no height": (i2i(image=raw(1, 0, 8)), "image.raw.height", "height 0 is not at least 1"),
    "raw negative": (i2i(image=raw(1, 8, -8, 8)), "image.raw.width", "width -8 is not"),
    "raw no frames": (i2i(image=raw(0, 8, 8)), "image.raw.frame_count", "not at least 1"),
    "raw vast": (i2i(image=raw(1, 2**30, 2**30, 1)), "image.raw", "the limit is 16777216"),
    "mask empty": (i2i(mask=pb.Mask()), "mask", "neither a picture nor boxes"),
    "mask no boxes": (i2i(mask=pb.Mask(boxes=pb.BoxList())), "mask.boxes.boxes", "has no box"),
    "mask many boxes": (
        i2i(mask=pb.Mask(boxes=pb.BoxList(boxes=[pb.Box(width=1, height=1)] * 257))),
        "mask.boxes.boxes",
        "257 items",
    ),
    "box outside": (i2i(mask=one_box(5, 0, 4, 1)), "mask.boxes.boxes[0]", "is not inside"),
    "box negative": (i2i(mask=one_box(-1, 0, 4, 1)), "mask.boxes.boxes[0]", "is not inside"),
    "box flat": (i2i(mask=one_box(0, 0, 4, 0)), "mask.boxes.boxes[0]", "is not inside"),
    "box vast": (
        i2i(mask=one_box(2**31 - 1, 0, 2**31 - 1, 1)),
        "mask.boxes.boxes[0]",
        "not inside",
    ),
    "mask dark": (
        i2i(mask=pb.Mask(picture=pb.Media(encoded=media.encode_picture(PICTURE, "png")))),
        "mask.picture",
        "dark everywhere",
    ),
    "mask of another size": (
        i2i(
            mask=pb.Mask(
                picture=pb.Media(raw=pb.RawFrames(data=b"1", frame_count=1, height=1, width=1))
            )
        ),
        "mask.picture",
        "1 x 1 pixels",
    ),
    "mask animated": (
        i2i(mask=pb.Mask(picture=pb.Media(encoded=media.encode_animation(CLIP, "gif")))),
        "mask.picture.encoded",
        "3 frames",
    ),
    "temperature negative": (
        sampled(temperature=-0.1),
        "sampling.temperature",
        "-0.1 is not in [0, 100]",
    ),
    "temperature nan": (sampled(temperature=NAN), "sampling.temperature", "nan is not in"),
    "temperature infinite": (sampled(temperature=INFINITY), "sampling.temperature", "inf is not"),
    "top_k negative": (sampled(top_k=-1), "sampling.top_k", "top_k -1 is not in"),
    "top_p zero": (sampled(top_p=0), "sampling.top_p", "top_p 0.0 is not in (0, 1]"),
    "top_p nan": (sampled(top_p=NAN), "sampling.top_p", "top_p nan"),
    "top_p above": (sampled(top_p=1.0001), "sampling.top_p", "top_p 1.0001"),
    "guidance huge": (sampled(guidance_scale=1e300), "sampling.guidance_scale", "1e+300 is not in"),
    "guidance nan": (sampled(guidance_scale=NAN), "sampling.guidance_scale", "nan is not in"),
    "seed negative": (sampled(seed=-1), "sampling.seed", "seed -1 is not in"),
    "sample negative": (sampled(sample_index=-1), "sampling.sample_index", "-1 is negative"),
    "schedule unknown": (image(schedule=9), "schedule", "schedule 9 is unknown"),
    "format unknown": (image(output=pb.Output(format=9)), "output.format", "9 is unknown"),
    "scale zero": (
        image(output=pb.Output(scale_factor=0)),
        "output.scale_factor",
        "0 is not in [1, 8]",
    ),
    "scale nine": (image(output=pb.Output(scale_factor=9)), "output.scale_factor", "9 is not in"),
    "field unknown": (
        with_unknown(image(), b"\xa0\x06\x01"),
        "",
        "field number 100 of nuwa.v1.Gen",
    ),
    "field unknown inside": (
        image(sampling=with_unknown(pb.Sampling(), b"\xa0\x06\x01")),
        "sampling",
        "field number 100 of nuwa.v1.Sampling",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_values_name_their_field(stub, engine, name):
    request, field, message = BAD_IMAGES[name]
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(request)
    error = failure.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in error.details()
    info, fields = details(error)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "nuwa.v1")
    assert list(fields) == [field] and message in fields[field]
    assert engine.admitted == []
    assert stub.GenerateImage(image()).frame.data


def clip_task(task: str, **fields) -> pb.GenerateVideoRequest:
    prompt = "a 3" if task.startswith("T") else ""
    return pb.GenerateVideoRequest(task=pb.Task.Value(f"TASK_{task}"), prompt=prompt, **fields)


MAPS_MEDIA = pb.Media(raw=pb.RawFrames(data=MAPS.tobytes(), frame_count=3, height=8, width=8))
BAD_CLIPS = {
    "task of images": (clip_task("T2I"), "task", "T2I is for GenerateImage"),
    "no frames": (video(frame_count=0), "frame_count", "frame_count 0 is not in [1, 10]"),
    "negative frames": (video(frame_count=-3), "frame_count", "-3 is not in"),
    "too many frames": (video(frame_count=11), "frame_count", "11 is not in [1, 10]"),
    "vast frames": (video(frame_count=2**31 - 1), "frame_count", "not in [1, 10]"),
    "sketch of another length": (
        clip_task("S2V", sketch=MAPS_MEDIA, frame_count=4),
        "frame_count",
        "frame_count is 4, but the sketch has 3 frames",
    ),
    "sketch coloured": (
        clip_task(
            "S2V",
            sketch=pb.Media(
                encoded=media.encode_picture(np.full((8, 8, 3), (1, 2, 3), np.uint8), "png")
            ),
        ),
        "sketch.encoded",
        "has colours",
    ),
    "sketch too long": (
        clip_task(
            "S2V",
            sketch=pb.Media(
                raw=pb.RawFrames(data=bytes(64 * 11), frame_count=11, height=8, width=8)
            ),
        ),
        "sketch",
        "11 frames; the model takes 10",
    ),
    "prediction of nothing": (
        clip_task("V2V", video=raw(3, 8, 8), frame_count=3),
        "video",
        "3 frames, which leaves none of 3",
    ),
    "edit of another length": (
        clip_task("TV2V", video=raw(3, 8, 8), mask=one_box(0, 0, 1, 1), frame_count=2),
        "frame_count",
        "the video has 3 frames",
    ),
    "animation unknown": (video(animation_format=7), "animation_format", "7 is unknown"),
    "speed without animation": (video(frames_per_second=8), "frames_per_second", "needs an anim"),
    "speed zero": (
        video(frames_per_second=0, animation_format=pb.ANIMATION_FORMAT_GIF),
        "frames_per_second",
        "0 is not in [1, 50]",
    ),
}


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_bad_values_of_clips_name_their_field(stub, engine, name):
    request, field, message = BAD_CLIPS[name]
    with pytest.raises(grpc.RpcError) as failure:
        list(stub.GenerateVideo(request))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in failure.value.details()
    assert list(details(failure.value)[1]) == [field]
    assert engine.admitted == []
    assert len(list(stub.GenerateVideo(video(frame_count=1)))) == 7


def test_a_prompt_of_exactly_the_limit_is_taken(stub):
    prompt = "ü" * 2048
    assert stub.GenerateImage(pb.GenerateImageRequest(task=pb.TASK_T2I, prompt=prompt)).frame.data


def test_a_task_that_the_bundle_lacks(stub):
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(pb.GenerateImageRequest(task=pb.TASK_S2I))
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "cannot do S2I; it can do T2I, I2I, TI2I" in failure.value.details()
    info, _ = details(failure.value)
    assert info.reason == "UNSUPPORTED_TASK"
    assert info.metadata["tasks"] == "T2I,I2I,TI2I,T2V,S2V,V2V,TV2V"


def test_what_the_engine_refuses_is_the_callers_mistake(stub):
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="refused"))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details() == "prompt 'refused' is refused"


@pytest.mark.parametrize("data", [b"\x1a\x02\xff\xfe", b"\x07garbage", b"\xff" * 1000])
def test_bytes_that_are_no_message_are_the_callers_mistake(channel, stub, data):
    for method in ("GenerateImage", "GetModel"):
        call = channel.unary_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as failure:
            call(data if method == "GenerateImage" else b"\x07garbage")
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stream = channel.unary_stream(f"/{SERVICE}/GenerateVideo")
    with pytest.raises(grpc.RpcError) as failure:
        list(stream(data))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert stub.GenerateImage(image()).frame.data


def test_messages_beyond_the_limit_are_refused(stub):
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image(image=pb.Media(encoded=bytes(17 * 2**20))))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.GenerateImage(image()).frame.data


def test_unknown_methods_are_unimplemented(channel):
    with pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary(f"/{SERVICE}/GenerateSound")(b"")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_long_messages_fit_into_headers(stub, engine, monkeypatch):
    def refuse(request):
        raise ValueError("wörd " * 5000)

    monkeypatch.setattr(engine, "check", refuse)
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image())
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().endswith("...") and len(failure.value.details()) <= 600
    assert details(failure.value)[0].reason == "INVALID_REQUEST"


# Faults of the engine.


@pytest.mark.parametrize("where", ["admit_error", "step_error"])
def test_faults_of_the_engine_are_internal_logged_and_not_told(stub, engine, caplog, where):
    setattr(engine, where, ValueError("secret of the engine"))
    with pytest.raises(grpc.RpcError) as failure:
        list(stub.GenerateVideo(video()))
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.value.details()
    assert details(failure.value)[0].reason == "INTERNAL"
    incident = failure.value.details().split()[-1]
    assert incident in caplog.text and "secret of the engine" in caplog.text
    assert engine.allocated == {}
    assert len(list(stub.GenerateVideo(video(frame_count=1)))) == 7


def test_mistakes_in_the_service_are_internal(stub, monkeypatch):
    monkeypatch.setattr("nuwa.runtime.convert.read_image_request", lambda *a: 1 / 0)
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image())
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "division" not in failure.value.details()


# Leaving, waiting, crowding.


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
    assert engine.allocated == {} and engine.steps <= 2
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
    assert retry.retry_delay.seconds == 1
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


def test_the_decode_thread_does_not_wait_for_readers(stub, server):
    call = stub.GenerateVideo(
        video(output=pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=8, include_tokens=True))
    )
    wait_until(lambda: server.scheduler.engine.steps == 40)
    wait_until(lambda: server.scheduler.active == 0)
    assert sum(event.HasField("frame") for event in call) == 10


# Health, reflection, ends.


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


def test_a_stop_without_grace_ends_calls_as_unavailable(server, engine, stub):
    engine.gate.clear()
    call = stub.GenerateVideo(video())
    assert next(call).HasField("accepted")
    threading.Timer(0.1, engine.gate.set).start()
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
    assert methods == {"GenerateImage", "GenerateVideo", "GetModel"}


def test_a_port_is_had_once(server):
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(OSError, match="is the port taken"):
        Server(FakeEngine(), port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_absurd_ports(port):
    with pytest.raises(ValueError, match="65535"):
        Server(FakeEngine(), port=port)


def test_listening_beyond_loopback_is_warned_about(caplog):
    with Server(FakeEngine(), host="0.0.0.0") as server:
        assert server.address.startswith("0.0.0.0:")
    assert "without encryption" in caplog.text


RUN = """
import sys, threading
from tests.runtime.fake_engine import FakeEngine
from nuwa.runtime.server import Server, serve_until_signal
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


def test_a_second_signal_cuts_the_drain(process):
    address = process.stdout.readline().split()[3].rstrip(":")
    with Client(address) as client:
        events = client.stream_video("t2v", "a 3")
        next(events)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
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
