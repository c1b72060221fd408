"""What the service does over gRPC when all is well, and when the engine fails."""

from __future__ import annotations

import dataclasses

import grpc
import numpy as np
import pytest

from nuwa.runtime import media
from nuwa.runtime.results import model_info
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb

from .fake_engine import expected_pixels, expected_tokens
from .messages import (
    CLIP,
    MAPS,
    PICTURE,
    details,
    image,
    video,
)


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
    assert (kinds[0], kinds[-1]) == ("accepted", "done")
    assert sorted(kinds[1:-1]) == ["frame"] * 3 + ["progress"] * 12
    told = [kinds[:n].count("progress") for n, kind in enumerate(kinds) if kind == "frame"]
    assert all(n >= 4 * index for index, n in enumerate(told, 1)), "no frame before its last token"
    assert (events[0].accepted.seed, events[0].accepted.frame_count) == (5, 3)
    assert events[0].accepted.request_id == events[-1].done.request_id == "r"
    frames = [event.frame.frame for event in events if event.WhichOneof("event") == "frame"]
    for index, frame in enumerate(frames):
        assert frame.index == index
        expected = expected_pixels(expected_tokens(5, index))
        np.testing.assert_array_equal(media.decode_clip(frame.data)[0], expected)
    last = [event.progress for event in events if event.WhichOneof("event") == "progress"][-1]
    assert (last.decoded_position_count, last.total_position_count) == (48, 48)
    assert (last.decoded_frame_count, last.total_frame_count) == (3, 3)
    assert events[-1].done.timings.step_count == 12 and events[-1].done.animation == b""


def test_the_time_for_given_tokens_and_for_files_is_told(stub):
    start = pb.Media(raw=pb.RawFrames(data=bytes(192), frame_count=1, height=8, width=8))
    predict = pb.GenerateVideoRequest(task=pb.TASK_V2V, video=start, frame_count=3)
    for request, given in ((predict, True), (video(frame_count=3), False)):
        times = list(stub.GenerateVideo(request))[-1].done.timings
        prefill, decode = times.prefill_duration, times.decode_duration
        assert (prefill.ToNanoseconds() > 0) == given
        assert prefill.ToNanoseconds() < decode.ToNanoseconds()
        assert times.encoding_duration.ToNanoseconds() > 0
    assert stub.GenerateImage(image()).timings.encoding_duration.ToNanoseconds() > 0


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


def test_a_fault_of_ours_is_not_told_as_the_callers(stub, monkeypatch, caplog):
    def broken(*arguments):
        raise ValueError("a secret of ours")

    monkeypatch.setattr(media, "upscale", broken)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateImage(image())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "a secret" not in caught.value.details() and "a secret of ours" in caplog.text


def test_a_clip_has_the_models_length_unless_told(stub):
    assert sum(e.HasField("frame") for e in stub.GenerateVideo(video())) == 10


def test_get_model(stub):
    model = stub.GetModel(pb.GetModelRequest()).model
    assert model.name == "fake" and model.parameter_count == 3_000_000_000
    assert pb.TASK_S2I not in model.tasks and pb.TASK_T2V in model.tasks
    assert (model.height, model.width, model.max_frame_count, model.slot_count) == (8, 8, 10, 1)


def test_what_a_request_leaves_open_is_the_models_default_for_its_task(stub, engine):
    cool = Sampling(temperature=0.25, top_k=5, guidance_scale=2.0)
    engine.info = dataclasses.replace(engine.info, sampling={Task.T2I: cool})
    stub.GenerateImage(image())
    stub.GenerateImage(image(sampling=pb.Sampling(temperature=0.5, top_k=0)))
    assert list(stub.GenerateVideo(video()))
    open_, said, other = (request.sampling for request in engine.admitted)
    assert open_ == cool
    assert said == Sampling(temperature=0.5, top_k=0, guidance_scale=2.0)
    assert other == Sampling()
    told = model_info(stub.GetModel(pb.GetModelRequest()).model)
    assert told.sampling[Task.T2I] == cool and told.sampling[Task.T2V] == Sampling()
    assert set(told.sampling) == set(told.tasks)


def test_defaults_that_a_server_leaves_out_are_the_plain_ones():
    half = pb.SamplingDefault(task=pb.TASK_T2I, sampling=pb.Sampling(top_k=5))
    told = model_info(pb.Model(sampling_defaults=[half]))
    assert told.sampling == {Task.T2I: Sampling(top_k=5)}


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
