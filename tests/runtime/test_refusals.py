"""What the service refuses, and that nothing of it hurts the next call."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status

from nuwa.runtime import media
from nuwa.runtime.convert import read_image_request
from nuwa.runtime.errors import FieldError, RequestError
from nuwa.runtime.server import SERVICE
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import (
    CLIP,
    MAPS,
    PICTURE,
    details,
    image,
    video,
)


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
    "image file of another size": (
        i2i(image=pb.Media(encoded=media.encode_picture(PICTURE[:4], "png"))),
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
        "dark everywhere, so nothing would be generated; bright, where to generate, is 128 or more",
    ),
    "raw mask dark": (
        i2i(
            mask=pb.Mask(
                picture=pb.Media(raw=pb.RawFrames(data=bytes(64), frame_count=1, height=8, width=8))
            )
        ),
        "mask.picture",
        "bright, where to generate, is not 0",
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
        "-0.1 is not in [0.001, 100]",
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
        "has the colour (1, 2, 3) at column 0, row 0 of frame 0",
    ),
    "sketch of unknown classes": (
        clip_task(
            "S2V",
            sketch=pb.Media(encoded=media.encode_picture(np.full((8, 8, 3), 9, np.uint8), "png")),
        ),
        "sketch.encoded",
        "sketch has class id 9 at column 0, row 0 of frame 0; this model's class ids are 0 to 4",
    ),
    "sketch too long": (
        clip_task(
            "S2V",
            sketch=pb.Media(
                raw=pb.RawFrames(data=bytes(64 * 11), frame_count=11, height=8, width=8)
            ),
        ),
        "sketch",
        "sketch has 11 frames; the model takes 10 at most, so give 1 to 10 of them",
    ),
    "prediction of nothing": (
        clip_task("V2V", video=raw(3, 8, 8), frame_count=3),
        "video",
        "video has 3 frames, which leaves none of 3 to predict; give at most 2, or a frame_count "
        "of 4 to 1000",
    ),
    "prediction of one frame": (
        clip_task("V2V", video=raw(1, 8, 8), frame_count=1),
        "video",
        "leaves none of 1 to predict; a frame_count of 2 to 1000",
    ),
    "prediction from the longest clip": (
        clip_task("V2V", video=raw(10, 8, 8)),
        "video",
        "none of 10 to predict; give at most 9, or a frame_count of 11 to 1000",
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


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_a_file_of_another_size_is_refused_before_its_pixels_are_decoded(kind, monkeypatch):
    monkeypatch.setattr(media, "decode_clip", lambda *_: pytest.fail("pixels were decoded"))
    picture = pb.Media(encoded=media.encode_picture(np.zeros((16, 8, 3), np.uint8), kind))
    with pytest.raises(FieldError, match="image is 8 x 16 pixels; this model takes 8 x 8"):
        read_image_request(i2i(image=picture), FakeEngine().info)


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


def blames_the_request_as_a_whole(error: grpc.RpcError) -> bool:
    info, fields = details(error)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return info.reason == "INVALID_REQUEST" and list(fields) == [""]


def test_a_call_without_a_request_is_the_callers_mistake(channel):
    with pytest.raises(grpc.RpcError) as failure:
        channel.stream_unary(f"/{SERVICE}/GenerateImage")(iter(()))
    assert failure.value.details() == "the call has no request"
    assert blames_the_request_as_a_whole(failure.value)


def test_a_model_without_a_bundle_cannot_be_loaded_again(channel):
    models = generation_pb2_grpc.ModelServiceStub(channel)
    with pytest.raises(grpc.RpcError) as failure:
        models.ReloadModel(pb.ReloadModelRequest(model="fake"))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, fields = details(failure.value)
    assert info.reason == "INVALID_REQUEST"
    assert fields == {"model": "model 'fake' was not loaded from a bundle"}


@pytest.mark.parametrize("data", [b"\x1a\x02\xff\xfe", b"\x07garbage", b"\xff" * 1000])
def test_bytes_that_are_no_message_are_the_callers_mistake(channel, stub, data):
    for method in ("GenerateImage", "GetModel"):
        call = channel.unary_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as failure:
            call(data if method == "GenerateImage" else b"\x07garbage")
        assert blames_the_request_as_a_whole(failure.value)
    stream = channel.unary_stream(f"/{SERVICE}/GenerateVideo")
    with pytest.raises(grpc.RpcError) as failure:
        list(stream(data))
    assert blames_the_request_as_a_whole(failure.value)
    infer = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    with pytest.raises(grpc.RpcError) as failure:
        list(infer(iter([b"\x07garbage"]), metadata=[("triton_grpc_error", "true")]))
    assert blames_the_request_as_a_whole(failure.value)
    assert stub.GenerateImage(image()).frame.data


def test_messages_beyond_the_limit_are_refused(stub):
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image(image=pb.Media(encoded=bytes(17 * 2**20))))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.GenerateImage(image()).frame.data


@pytest.mark.parametrize(
    "method",
    [
        f"/{SERVICE}/GenerateSound",
        "/nuwa.v1.ModelService/ReloadModels",
        "/inference.GRPCInferenceService/TraceSetting",
    ],
)
def test_unknown_methods_are_unimplemented(channel, method):
    with pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary(method)(b"")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert failure.value.details() == f"this server has no method {method!r}"
    info, _ = details(failure.value)
    assert (info.reason, info.domain) == ("UNIMPLEMENTED", "nuwa.v1")
    with pytest.raises(grpc.RpcError) as failure:
        list(channel.unary_stream(method)(b""))
    assert details(failure.value)[0].reason == "UNIMPLEMENTED"


def test_unknown_services_are_grpcs_to_refuse(channel):
    with pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary("/other.Service/Method")(b"")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert rpc_status.from_call(failure.value) is None


def test_long_messages_fit_into_headers(stub, engine, monkeypatch):
    def refuse(request):
        raise RequestError("wörd " * 5000)

    monkeypatch.setattr(engine, "check", refuse)
    with pytest.raises(grpc.RpcError) as failure:
        stub.GenerateImage(image())
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().endswith("...") and len(failure.value.details()) <= 600
    assert details(failure.value)[0].reason == "INVALID_REQUEST"
