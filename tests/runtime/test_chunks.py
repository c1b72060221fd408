"""Large frames and files come in pieces, and whole out of the clients."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nuwa.runtime import replies
from nuwa.runtime.async_client import AsyncClient
from nuwa.runtime.core import Frame, Preview
from nuwa.runtime.results import ImageSample
from nuwa.v1 import generation_pb2 as pb

from .fake_engine import expected_pixels, expected_tokens
from .messages import image, video

PIECE = 100


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(replies, "CHUNK_BYTES", PIECE)


RAW = pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, include_tokens=True)  # 192 bytes a frame


def test_frames_of_a_clip(stub):
    request = video(frame_count=2, sampling=pb.Sampling(seed=5), output=RAW)
    frames = [e.frame.frame for e in stub.GenerateVideo(request) if e.HasField("frame")]
    assert [(f.index, f.chunk_index, f.chunk_count, len(f.data)) for f in frames] == [
        (0, 0, 2, 100),
        (0, 1, 2, 92),
        (1, 0, 2, 100),
        (1, 1, 2, 92),
    ]
    assert [f.HasField("token_grid") for f in frames] == [True, False, True, False]
    assert {(f.height, f.width, f.format) for f in frames} == {(8, 8, pb.IMAGE_FORMAT_RAW_RGB)}
    data = frames[0].data + frames[1].data
    assert data == expected_pixels(expected_tokens(5, 0)).tobytes()


def test_small_frames_and_single_answers_stay_whole(stub):
    request = video(frame_count=1, output=pb.Output(format=pb.IMAGE_FORMAT_PNG))
    [frame] = [e.frame.frame for e in stub.GenerateVideo(request) if e.HasField("frame")]
    assert len(frame.data) <= PIECE and frame.chunk_count == 0
    assert len(stub.GenerateImage(image(output=RAW)).frame.data) == 192


def test_a_clip_as_a_file(stub, client, monkeypatch):
    options = {"frame_count": 3, "seed": 5, "animation_format": "webp", "include_tokens": True}
    pieces = client.generate_video("t2v", "a 3", **options)
    monkeypatch.setattr(replies, "CHUNK_BYTES", 2**20)
    whole = client.generate_video("t2v", "a 3", **options)
    assert len(whole.animation) > PIECE and pieces.animation == whole.animation
    assert (pieces.frames == whole.frames).all() and (pieces.tokens == whole.tokens).all()
    assert (whole.frames[2] == expected_pixels(expected_tokens(5, 2))).all()


def test_a_file_comes_before_the_end(stub):
    asked = video(frame_count=2, animation_format=pb.ANIMATION_FORMAT_WEBP)
    events = list(stub.GenerateVideo(asked))
    pieces = [e.animation for e in events if e.HasField("animation")]
    assert [e.chunk_index for e in pieces] == list(range(pieces[0].chunk_count))
    assert all(len(each.data) <= PIECE for each in pieces)
    assert events[-1].HasField("done") and not events[-1].done.animation
    assert b"".join(each.data for each in pieces).startswith(b"RIFF")


def test_images_and_previews(client):
    events = list(client.stream_image("t2i", "a 3", previews=2, seed=5, samples=2))
    samples = [each for each in events if isinstance(each, ImageSample)]
    for each in samples:
        expected = expected_pixels(expected_tokens(5 + each.sample_index, 0))
        assert (each.pixels == expected).all()
    assert len(samples) == 2
    assert {e.pixels.shape for e in events if isinstance(e, Preview)} == {(8, 8, 3)}


def test_the_asyncio_client_puts_them_together(server):
    async def main():
        async with AsyncClient(server.address) as client:
            clip = await client.generate_video("t2v", "a 3", seed=5, animation_format="webp")
            image = [e async for e in client.stream_image("t2i", "a 3", seed=5)]
            return clip, image

    clip, image = asyncio.run(main())
    expected = [expected_pixels(expected_tokens(5, frame)) for frame in range(10)]
    assert (clip.frames == np.stack(expected)).all() and len(clip.animation) > PIECE
    [sample] = [each for each in image if isinstance(each, ImageSample)]
    assert (sample.pixels == expected[0]).all()
    assert not any(isinstance(each, Frame) for each in image)
