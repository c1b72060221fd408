"""Several samples of a request and the best of them, through both clients and over gRPC.

The fake ranker "first" scores a sample by its first token, which for seed 510 and four samples is
510, 511, 0, 1: the order is sample 1, 0, 3, 2.
"""

from __future__ import annotations

import re
import threading
import weakref

import grpc
import numpy as np
import pytest

from nuwa.runtime import media
from nuwa.runtime.client import Client, LocalClient
from nuwa.runtime.core import Accepted, Frame, GenerationRequest, Progress
from nuwa.runtime.errors import EngineError, FieldError
from nuwa.runtime.results import ClipDone
from nuwa.runtime.samples import MAX_REQUEST_PIXELS, Samples
from nuwa.runtime.selection import Contest
from nuwa.runtime.server import Server
from nuwa.spec.palette import voc_palette
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import CLASSES, FakeEngine, expected_pixels, expected_tokens
from .messages import details, image, video, wait_until, wait_until_told_to_cancel

SCORES = {0: 510.0, 1: 511.0, 2: 0.0, 3: 1.0}


@pytest.fixture
def engine():
    return FakeEngine(slots=3)


def pictures(seed: int, frames: int) -> np.ndarray:
    return np.stack([expected_pixels(expected_tokens(seed, index)) for index in range(frames)])


def test_samples_of_an_image(client):
    result = client.generate_image("t2i", "a 3", seed=20, samples=5, include_tokens=True)
    assert [each.sample_index for each in result.samples] == [0, 1, 2, 3, 4]
    for index, sample in enumerate(result.samples):
        np.testing.assert_array_equal(sample.pixels, pictures(20 + index, 1)[0])
        np.testing.assert_array_equal(sample.tokens, expected_tokens(20 + index, 0))
        assert sample.score is None
    np.testing.assert_array_equal(result.pixels, result.samples[0].pixels)
    assert result.scores == {} and result.timings.ranking == 0


def test_a_plain_request_has_one_sample(client):
    result = client.generate_image("t2i", "a 3", seed=20, sample_index=3)
    (sample,) = result.samples
    assert (sample.sample_index, sample.score) == (3, None)
    np.testing.assert_array_equal(sample.pixels, pictures(23, 1)[0])
    clip = client.generate_video("t2v", "a 3", seed=20, sample_index=3, frame_count=2)
    assert [each.sample_index for each in clip.samples] == [3] and clip.scores == {}


def test_the_best_images(client):
    options = {"seed": 510, "samples": 4, "rank_by": "first"}
    result = client.generate_image("t2i", "a 3", return_count=3, **options)
    assert [(each.sample_index, each.score) for each in result.samples] == [
        (1, 511.0),
        (0, 510.0),
        (3, 1.0),
    ]
    assert result.scores == SCORES
    np.testing.assert_array_equal(result.pixels, pictures(511, 1)[0])
    np.testing.assert_array_equal(result.samples[2].pixels, pictures(513, 1)[0])
    best = client.generate_image("t2i", "a 3", **options)
    assert [each.sample_index for each in best.samples] == [1] and best.scores == SCORES
    assert 0 < best.timings.ranking <= best.timings.total


def test_one_sample_can_be_scored(client):
    result = client.generate_image("t2i", "a 3", seed=7, rank_by="first")
    assert result.scores == {0: 7.0} and result.samples[0].score == 7.0


def test_samples_of_a_clip(client):
    result = client.generate_video("t2v", "a 3", seed=20, samples=4, frame_count=3, sample_index=5)
    assert [each.sample_index for each in result.samples] == [5, 6, 7, 8]
    for sample in result.samples:
        np.testing.assert_array_equal(sample.frames, pictures(20 + sample.sample_index, 3))
    np.testing.assert_array_equal(result.frames, result.samples[0].frames)


def test_the_best_clips(client):
    seen = []
    result = client.generate_video(
        "t2v",
        "a 3",
        seed=510,
        samples=4,
        rank_by="first",
        return_count=2,
        frame_count=2,
        animation_format="webp",
        on_event=seen.append,
    )
    assert [(each.sample_index, each.score) for each in result.samples] == [(1, 511), (0, 510)]
    np.testing.assert_array_equal(result.frames, pictures(511, 2))
    np.testing.assert_array_equal(media.decode_clip(result.animation), result.frames)
    assert result.scores == SCORES
    frames = [(each.sample_index, each.index) for each in seen if isinstance(each, Frame)]
    assert frames == [(1, 0), (1, 1), (0, 0), (0, 1)]
    first = next(index for index, each in enumerate(seen) if isinstance(each, Frame))
    assert not any(isinstance(each, Accepted | Progress) for each in seen[first:])
    assert {each.sample_index for each in seen if isinstance(each, Progress)} == {0, 1, 2, 3}
    assert isinstance(seen[-1], ClipDone) and seen[-1].sample_index == 1


def test_samples_that_are_not_ranked_stream_as_they_come(client, engine):
    engine.slots = 1
    events = client.stream_video("t2v", "a 3", seed=20, samples=2, frame_count=1)
    kinds = [(type(event), event.sample_index) for event in events]
    own = [Accepted, *[Progress] * 4, Frame]
    for sample in range(2):
        assert [kind for kind, of in kinds[:-1] if of == sample] == own
    assert kinds[-1] == (ClipDone, 0) and len(kinds) == 13


def test_the_animation_of_samples_that_are_not_ranked_is_that_of_the_first(client):
    clip = client.generate_video(
        "t2v", "a 3", seed=20, samples=3, frame_count=2, animation_format="gif"
    )
    np.testing.assert_array_equal(media.decode_clip(clip.animation), pictures(20, 2))


def test_equal_scores_are_in_the_order_of_the_index(client, engine):
    engine.rankers["first"] = lambda prompt, frames: 0.25
    result = client.generate_image("t2i", "a 3", samples=3, rank_by="first", return_count=3)
    assert [each.sample_index for each in result.samples] == [0, 1, 2]


def test_a_ranker_gets_the_prompt_and_all_frames(client, engine):
    asked = []
    engine.rankers["first"] = lambda prompt, frames: asked.append((prompt, frames)) or 1
    client.generate_video("t2v", "a 3 moves", seed=9, rank_by="first", frame_count=4)
    ((prompt, frames),) = asked
    assert prompt == "a 3 moves"
    np.testing.assert_array_equal(frames, pictures(9, 4))


def test_ranking_does_not_hold_up_others(client, engine):
    ranking, go_on = threading.Event(), threading.Event()

    def slow(prompt: str, frames: np.ndarray) -> float:
        ranking.set()
        assert go_on.wait(60)
        return 1.0

    engine.rankers["first"] = slow
    results = []
    thread = threading.Thread(
        target=lambda: results.append(client.generate_image("t2i", "a 3", rank_by="first"))
    )
    thread.start()
    assert ranking.wait(60)
    assert client.generate_image("t2i", "a 3").timings.steps == 4
    assert results == []
    go_on.set()
    thread.join(60)
    assert results[0].scores == {0: 1.0}


def test_leaving_while_samples_are_ranked_ends_the_request(client, engine, request):
    engine.gate.clear()
    events = client.stream_video("t2v", "a 3", samples=60, rank_by="first")
    next(events)
    events.close()
    if isinstance(client, Client):
        wait_until_told_to_cancel(request.getfixturevalue("server"))
    engine.gate.set()
    wait_until(lambda: not engine.allocated)
    assert engine.steps < 60 // 3 * 40


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "many"])
def test_scores_that_are_no_numbers_are_the_rankers_fault(engine, score):
    engine.rankers["first"] = lambda prompt, frames: score
    with LocalClient(engine) as client, pytest.raises(EngineError, match="ranker 'first' "):
        client.generate_image("t2i", "a 3", samples=2, rank_by="first")


LARGE = pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=8)  # 12 KiB a frame


def test_a_failing_ranker_is_internal_and_frees_the_slots(stub, engine, caplog):
    with pytest.raises(grpc.RpcError) as failure:
        list(stub.GenerateVideo(video(sample_count=9, rank_by="broken", frame_count=2)))
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.value.details() and "secret of the ranker" in caplog.text
    wait_until(lambda: not engine.allocated)
    assert stub.GenerateImage(image()).frame.data


def test_frames_of_lost_samples_are_not_kept():
    request = GenerationRequest(Task.T2V, "a 3", frame_count=3)
    contest = Contest(request, Samples(40, 2, "first"), FakeEngine().rankers["first"])
    frames: list[weakref.ref[Frame]] = []
    for sample in range(40):
        for index, pixels in enumerate(pictures(7 * sample, 3)):
            frame = Frame(index, pixels, expected_tokens(7 * sample, index), sample)
            frames.append(weakref.ref(frame))
            contest.add(frame)
        del frame
        assert sum(each() is not None for each in frames) <= 2 * 3
    assert [clip[0].sample_index for clip in contest.best] == [39, 38]


@pytest.mark.parametrize(
    ("request_", "field", "kept"),
    [
        # 8 x 8 pixels: 192 bytes a frame; two slots beside those that are returned
        (
            video(sample_count=64, rank_by="first", return_count=62),
            "return_count",
            "64 samples of 10",
        ),
        (image(sample_count=64, rank_by="first", output=LARGE), "frame_count", "1 samples"),
        (image(sample_count=64, output=LARGE), "sample_count", "64 samples"),
    ],
)
def test_what_waits_to_be_ranked_or_for_one_answer_is_no_more_than_may_be_unread(
    request_, field, kept
):
    with Server(FakeEngine(slots=2), max_unread_bytes=2**20) as server:
        server.intake._most_unread = 100_000  # less than settings allow, as pictures here are small
        with grpc.insecure_channel(server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)

            def ask(request):
                video = isinstance(request, pb.GenerateVideoRequest)
                return list(stub.GenerateVideo(request)) if video else stub.GenerateImage(request)

            if kept.startswith("1 "):  # one frame that is returned, whatever was ranked
                assert len(ask(request_).frame.data) == 12_288
                return
            with pytest.raises(grpc.RpcError) as caught:
                ask(request_)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            _, fields = details(caught.value)
            assert list(fields) == [field] and kept in fields[field]
            assert "max_unread_bytes allows 0 MB" in fields[field]
            request_.ClearField("return_count")
            request_.sample_count = 8
            assert ask(request_), "fewer are taken"


@pytest.mark.parametrize(
    ("request_", "field", "told"),
    [
        (image(output=LARGE), "output.scale_factor", "1 sample of 1 frame would .*StreamImage"),
        (image(), "", "1 sample of 1 frame"),
        (
            video(frame_count=9, animation_format=pb.ANIMATION_FORMAT_GIF),
            "frame_count",
            "1 sample of 9 frames would have to be kept for the animation",
        ),
        (video(frame_count=9, sample_count=2, rank_by="first"), "sample_count", "until.*time$"),
    ],
)
def test_what_cannot_be_held_is_told_of_the_field_that_makes_it_so_much(request_, field, told):
    with Server(FakeEngine(slots=2), max_unread_bytes=2**20) as server:
        server.intake._most_unread = 100
        with grpc.insecure_channel(server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                if isinstance(request_, pb.GenerateVideoRequest):
                    list(stub.GenerateVideo(request_))
                else:
                    stub.GenerateImage(request_)
    _, fields = details(caught.value)
    assert list(fields) == [field] and re.search(told, fields[field])


def test_answers_to_plain_requests_list_no_samples(stub):
    answer = stub.GenerateImage(image())
    assert not answer.samples and not answer.scores
    done = list(stub.GenerateVideo(video(frame_count=1)))[-1].done
    assert not done.scores and done.sample_index == 0


def test_messages_of_ranked_samples(stub):
    sampling = pb.Sampling(seed=510, sample_index=0)
    answer = stub.GenerateImage(
        image(sampling=sampling, sample_count=4, rank_by="first", return_count=2)
    )
    assert answer.frame == answer.samples[0].frame != answer.samples[1].frame
    assert [(each.sample_index, each.score) for each in answer.samples] == [(1, 511), (0, 510)]
    assert {each.sample_index: each.score for each in answer.scores} == SCORES
    events = list(
        stub.GenerateVideo(video(sampling=sampling, sample_count=4, rank_by="first", frame_count=1))
    )
    assert events[-2].frame.sample_index == 1 == events[-1].done.sample_index
    assert {each.sample_index: each.score for each in events[-1].done.scores} == SCORES
    assert events[-1].done.timings.ranking_duration.ToNanoseconds() > 0


def test_get_model_tells_what_can_be_asked(stub, engine):
    model = stub.GetModel(pb.GetModelRequest()).model
    assert list(model.rankers) == ["first", "broken"] and model.max_sample_count == 64
    assert (model.max_frame_count, model.max_prediction_frame_count) == (10, 1000)
    assert model.sketch_class_count == CLASSES
    assert model.sketch_palette == voc_palette(CLASSES).tobytes()


BAD = {
    "none": ({"sample_count": 0}, "sample_count", "sample_count 0 is not in [1, 64]"),
    "many": ({"sample_count": 65}, "sample_count", "65 is not in [1, 64]"),
    "negative": ({"sample_count": -1}, "sample_count", "-1 is not in"),
    "no ranker": (
        {"sample_count": 2, "rank_by": "clip2"},
        "rank_by",
        "there is no ranker 'clip2'; choose one of first, broken",
    ),
    "return none": ({"sample_count": 2, "return_count": 0}, "return_count", "0 is not in [1, 2]"),
    "return more": (
        {"sample_count": 2, "return_count": 3, "rank_by": "first"},
        "return_count",
        "return_count 3 is not in [1, 2], the sample_count",
    ),
    "return some": ({"sample_count": 2, "return_count": 1}, "return_count", "needs rank_by"),
    "beyond the last index": (
        {"sample_count": 2, "sampling": pb.Sampling(sample_index=2**31 - 1)},
        "sampling.sample_index",
        "go beyond 2147483647",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", ["image", "video"])
def test_bad_values_name_their_field(stub, engine, name, method):
    fields, field, message = BAD[name]
    with pytest.raises(grpc.RpcError) as failure:
        if method == "image":
            stub.GenerateImage(image(**fields))
        else:
            list(stub.GenerateVideo(video(**fields)))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in failure.value.details() and list(details(failure.value)[1]) == [field]
    assert engine.admitted == []


def test_ranking_needs_a_prompt(engine):
    given = pictures(0, 2)
    with LocalClient(engine) as client, pytest.raises(FieldError, match="rank_by needs a prompt"):
        client.generate_video("v2v", video=given, rank_by="first")
    with LocalClient(engine) as client:
        assert client.generate_video("v2v", "a 3", video=given, rank_by="first").scores
    engine = FakeEngine()
    engine.info = type(engine.info)(**{**vars(engine.info), "rankers": ()})
    with LocalClient(engine) as client, pytest.raises(FieldError, match="there is none here"):
        client.generate_image("t2i", "a 3", rank_by="first")


def test_too_many_frames_are_refused():
    engine = FakeEngine()
    large = {"height": 512, "width": 512}
    engine.info = type(engine.info)(**{**vars(engine.info), **large})
    most = MAX_REQUEST_PIXELS // 512**2
    assert most == 512
    with LocalClient(engine) as client:
        with pytest.raises(FieldError, match="64 samples of 10 frames are more") as bad:
            client.generate_video("t2v", "a 3", samples=64, rank_by="first")
        assert bad.value.field == "sample_count"
        given = np.zeros((1, 512, 512, 3), np.uint8)
        with pytest.raises(FieldError, match="1 samples of 513 frames") as bad:
            client.generate_video("v2v", video=given, frame_count=513)
        assert bad.value.field == "frame_count"
        with pytest.raises(FieldError, match="the returned images would have") as bad:
            client.generate_image("t2i", "a 3", samples=64, scale=4)


def test_predictions_go_beyond_the_models_length(client):
    given = pictures(3, 2)
    seen = 0
    for event in client.stream_video("v2v", video=given, frame_count=50, seed=3):
        if isinstance(event, Frame):
            np.testing.assert_array_equal(event.pixels, pictures(3, 50)[seen])
            seen += 1
    assert seen == 50
    with pytest.raises(Exception, match=r"frame_count 1001 is not in \[1, 1000\]"):
        client.generate_video("v2v", video=given, frame_count=1001)
    with pytest.raises(Exception, match=r"frame_count 11 is not in \[1, 10\]"):
        client.generate_video("t2v", "a 3", frame_count=11)
