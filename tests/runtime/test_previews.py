"""Unfinished images on request: what is decoded so far, the rest grey."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from nuwa.runtime.client import Client, ClientError
from nuwa.runtime.core import Accepted, GenerationRequest, Preview, Progress
from nuwa.runtime.errors import FieldError
from nuwa.runtime.painter import GREY
from nuwa.runtime.results import ImageDone, ImageSample
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb

from .engine_run import PROMPT, alone, tiny_engine
from .fake_engine import expected_pixels, expected_tokens
from .messages import wait_until, wait_until_told_to_cancel


def test_an_image_is_shown_while_it_is_made(client):
    events = list(client.stream_image("t2i", "a 3", seed=7, previews=3))
    assert isinstance(events[0], Accepted) and isinstance(events[-1], ImageDone)
    assert sum(isinstance(event, Progress) for event in events) == 4
    whole = expected_pixels(expected_tokens(7, 0))
    assert isinstance(events[-2], ImageSample) and events[-1].timings.steps == 4
    np.testing.assert_array_equal(events[-2].pixels, whole)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.positions_done for preview in previews] == [4, 8, 12]
    for rows, preview in enumerate(previews, 1):
        np.testing.assert_array_equal(preview.pixels[: 2 * rows], whole[: 2 * rows])
        assert (preview.pixels[2 * rows :] == GREY).all()


def test_what_is_given_is_shown_from_the_start(client):
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    mask = np.zeros((8, 8), bool)
    mask[2:] = True
    events = client.stream_image("i2i", image=picture, mask=mask, seed=1, previews=1)
    (preview,) = (event for event in events if isinstance(event, Preview))
    np.testing.assert_array_equal(preview.pixels[:2], picture[:2])
    assert (preview.pixels[4:] == GREY).all()


def test_samples_have_previews_of_their_own(client):
    events = list(client.stream_image("t2i", "a 3", seed=7, samples=3, previews=1))
    shown = [event for event in events if isinstance(event, Preview)]
    assert sorted(each.sample_index for each in shown) == [0, 1, 2]
    for each in shown:
        whole = expected_pixels(expected_tokens(7 + each.sample_index, 0))
        np.testing.assert_array_equal(each.pixels[:4], whole[:4])
    made = [event for event in events if isinstance(event, ImageSample)]
    assert sorted(sample.sample_index for sample in made) == [0, 1, 2]
    assert events[-1].sample_index == 0 and events[-1].scores == {}


def test_ranked_samples_come_best_first(client):
    events = list(client.stream_image("t2i", "a 3", seed=7, samples=3, rank_by="first"))
    made = [event for event in events if isinstance(event, ImageSample)]
    assert [sample.sample_index for sample in made] == [2]
    assert events[-1].sample_index == 2 and events[-1].scores == {0: 7.0, 1: 8.0, 2: 9.0}


def test_without_previews_there_are_none(client):
    events = list(client.stream_image("t2i", "a 3", seed=7))
    assert not any(isinstance(event, Preview) for event in events)
    np.testing.assert_array_equal(
        events[-2].pixels, client.generate_image("t2i", "a 3", seed=7).pixels
    )


def test_bad_requests_name_the_field(client):
    with pytest.raises((ClientError, FieldError), match=r"preview_count 17 is not in \[0, 16\]"):
        list(client.stream_image("t2i", "a 3", previews=17))
    for prompt, says in (("", "prompt is empty"), ("refused", "prompt 'refused' is refused")):
        with pytest.raises((ClientError, FieldError), match=says) as failure:
            list(client.stream_image("t2i", prompt))
        error = failure.value
        fields = [error.field] if isinstance(error, FieldError) else list(error.fields)
        assert fields == ["image.prompt"]


def test_leaving_early_cancels(client, engine, request):
    engine.gate.clear()
    events = client.stream_image("t2i", "a 3", previews=2)
    assert isinstance(next(events), Accepted)
    events.close()
    if isinstance(client, Client):
        wait_until_told_to_cancel(request.getfixturevalue("server"))
    engine.gate.set()
    wait_until(lambda: engine.allocated == {} and engine.prepared == [])
    assert engine.steps < 4


def test_clips_have_frames_instead():
    with pytest.raises(ValueError, match="task t2v has no previews"):
        GenerationRequest(Task.T2V, "a 3", previews=1)


def test_a_request_without_an_image_is_refused(stub):
    with pytest.raises(grpc.RpcError) as failure:
        list(stub.StreamImage(pb.StreamImageRequest()))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_real_image_grows_into_itself(tiny_bundle):
    wanted = GenerationRequest(Task.T2I, PROMPT, seed=3)
    engine = tiny_engine(tiny_bundle, slots=1)
    expected = alone(engine, wanted).tokens[0]
    prepared = engine.prepare(wanted)
    engine.admit(prepared, 0)
    before = np.zeros((4, 4), bool)
    while True:
        (result,) = engine.step()
        if result.done:
            break
        tokens, decoded = engine.unfinished(0)
        assert decoded.sum() == result.positions_done and (decoded >= before).all()
        assert (tokens[decoded] == expected[decoded]).all()
        before = decoded
    engine.release(0)
    prepared.close()
