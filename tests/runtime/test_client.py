"""Both clients over the fake engine: the same calls, the same answers."""

from __future__ import annotations

import asyncio
import dataclasses
import io
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
from PIL import Image, PngImagePlugin

from nuwa.runtime import client as client_module
from nuwa.runtime import media
from nuwa.runtime import server as server_module
from nuwa.runtime.async_client import AsyncClient
from nuwa.runtime.client import Client, ClientError, LocalClient
from nuwa.runtime.core import Accepted, Frame, Progress, QueueFullError, UnsupportedTaskError
from nuwa.runtime.errors import DeadlineExceededError, FieldError
from nuwa.runtime.requests import image_request, video_request
from nuwa.runtime.results import ClipDone
from nuwa.runtime.server import Server
from nuwa.runtime.settings import ServerSettings
from nuwa.spec.palette import voc_palette
from nuwa.spec.sampling import Sampling

from .fake_engine import FakeEngine, expected_pixels, expected_tokens
from .messages import wait_until, wait_until_told_to_cancel

PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
CLIP = np.stack([PICTURE, PICTURE, PICTURE + 1])


def test_an_image(client):
    result = client.generate_image("t2i", "a 3", seed=9, include_tokens=True, request_id="mine")
    np.testing.assert_array_equal(result.tokens, expected_tokens(9, 0))
    np.testing.assert_array_equal(result.pixels, expected_pixels(expected_tokens(9, 0)))
    assert (result.seed, result.request_id, result.timings.steps) == (9, "mine", 4)
    assert result.timings.total >= result.timings.decode > 0
    assert client.generate_image("T2I", "a 3").tokens is None


def test_an_image_in_a_file(client):
    result = client.generate_image("t2i", "a 3", seed=9, output_format="png", scale=2)
    np.testing.assert_array_equal(media.decode_clip(result.data)[0], result.pixels)
    assert result.data.startswith(b"\x89PNG") and result.pixels.shape == (16, 16, 3)


def test_a_clip(client):
    seen = []
    result = client.generate_video(
        "t2v",
        "a 3",
        frame_count=3,
        seed=9,
        include_tokens=True,
        animation_format="webp",
        frames_per_second=4,
        on_event=seen.append,
    )
    tokens = np.stack([expected_tokens(9, frame) for frame in range(3)])
    np.testing.assert_array_equal(result.tokens, tokens)
    np.testing.assert_array_equal(result.frames, expected_pixels(tokens))
    np.testing.assert_array_equal(media.decode_clip(result.animation), result.frames)
    kinds = [type(event) for event in seen]
    assert (kinds[0], kinds[-1]) == (Accepted, ClipDone)
    assert (kinds.count(Progress), kinds.count(Frame), len(kinds)) == (12, 3, 17)
    assert result.timings.steps == 12 and result.seed == 9


def test_arrays_arrive_as_they_are(client, engine):
    mask = np.zeros((8, 8), bool)
    mask[2:4] = True
    maps = CLIP[..., 0].copy()
    client.generate_image("i2i", image=PICTURE, mask=mask)
    client.generate_video("tv2v", "a 3", video=CLIP, mask=[(1, 2, 3, 4), (0, 0, 1, 1)])
    client.generate_video("s2v", sketch=maps)
    client.generate_video("v2v", video=CLIP, sample_index=2, schedule="raster", temperature=0.5)
    completion, edit, drawn, predicted = engine.admitted
    np.testing.assert_array_equal(completion.frames, PICTURE[None])
    np.testing.assert_array_equal(completion.mask, mask)
    np.testing.assert_array_equal(edit.frames, CLIP)
    assert edit.mask.sum() == 13 and edit.mask[2:6, 1:4].all()
    np.testing.assert_array_equal(drawn.sketch, maps)
    assert (predicted.frame_count, predicted.sample_index, predicted.schedule) == (10, 2, "raster")
    assert predicted.sampling.temperature == 0.5


@pytest.mark.parametrize("frames", [1, 3])
def test_sketches_in_colour_arrive_as_classes(client, engine, frames):
    maps = np.arange(frames * 64, dtype=np.uint8).reshape(frames, 8, 8) % 5
    colours = voc_palette(5)[maps]
    client.generate_video("s2v", sketch=colours if frames > 1 else colours[0])
    np.testing.assert_array_equal(engine.admitted[0].sketch, maps)


def test_files_arrive_as_they_are(client, engine, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(media.encode_picture(PICTURE, "png"))
    client.generate_image("ti2i", "a 3", image=path, mask=[(0, 0, 8, 8)])
    client.generate_image("ti2i", "a 3", image=path.read_bytes(), mask=path)
    for request in engine.admitted:
        np.testing.assert_array_equal(request.frames, PICTURE[None])


def test_get_model(client, engine):
    sampling = {task: Sampling(top_k=3) for task in engine.info.tasks}
    engine.info = dataclasses.replace(engine.info, sampling=sampling)
    assert client.get_model() == engine.info


def test_leaving_a_stream_cancels_it(client, engine, request):
    engine.gate.clear()
    events = client.stream_video("t2v", "a 3")
    assert isinstance(next(events), Accepted)
    events.close()
    if isinstance(client, Client):
        wait_until_told_to_cancel(request.getfixturevalue("server"))
    engine.gate.set()
    wait_until(lambda: not engine.allocated)
    assert engine.steps < 40


def test_a_stream_that_is_never_read_is_never_made(client, engine):
    client.stream_video("t2v", "a 3")
    client.stream_video("t2v", "").close()
    unread = client.stream_video("t2v", "a 3", seed=7)
    time.sleep(0.1)
    assert engine.admitted == []
    client.generate_image("t2i", "a 3", deadline=5)
    assert isinstance(next(unread), Accepted)
    unread.close()
    assert [request.seed for request in engine.admitted[1:]] == [7]


def test_errors_of_the_server_are_client_errors(engine):
    with Server(engine) as server, Client(server.address) as client:
        with pytest.raises(ClientError, match="top_p 2.0 is not in") as failure:
            client.generate_image("t2i", "a 3", top_p=2)
        assert failure.value.reason == "INVALID_REQUEST"
        assert failure.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(failure.value.fields) == ["sampling.top_p"]
        with pytest.raises(ClientError, match="cannot do S2I") as failure:
            client.generate_image("s2i", sketch=PICTURE[..., 0])
        assert failure.value.metadata["tasks"].startswith("T2I,")
        with pytest.raises(ClientError) as failure:
            client.generate_video("t2v")
        assert "prompt" in failure.value.fields
        engine.gate.clear()
        with pytest.raises(ClientError) as failure:
            client.generate_image("t2i", "a 3", deadline=0.1)
        assert failure.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        engine.gate.set()


def test_errors_without_a_server_are_the_plain_ones(engine):
    with LocalClient(engine) as client:
        with pytest.raises(FieldError, match="top_p 2.0"):
            client.generate_image("t2i", "a 3", top_p=2)
        with pytest.raises(UnsupportedTaskError):
            client.generate_image("s2i", sketch=PICTURE[..., 0])
        engine.step = lambda until=None: time.sleep(0.01) or []
        with pytest.raises(DeadlineExceededError):
            client.generate_image("t2i", "a 3", deadline=0.05)


RUN = """
from tests.runtime.fake_engine import FakeEngine
from nuwa.runtime.server import Server
engine = FakeEngine()
engine.gate.clear()
with Server(engine) as server:
    print(server.address, flush=True)
    input()
    engine.gate.set()
"""


@pytest.fixture
def process():
    """A server whose engine is never done; the first line it writes is its address."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def impatient(monkeypatch):
    """Clients that ask after a second whether the server lives, and wait for another.

    Servers put up with a few questions that come too soon.
    """
    monkeypatch.setattr(client_module, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(client_module, "KEEPALIVE_TIMEOUT_MS", 1000)


def freeze(process) -> float:
    """When it was."""
    process.send_signal(signal.SIGSTOP)
    return time.monotonic()


def test_a_call_ends_when_its_server_freezes(process, impatient):
    with Client(process.stdout.readline().strip(), attempts=1) as client:
        events = client.stream_video("t2v", "a 3")
        assert isinstance(next(events), Accepted)
        frozen = freeze(process)
        with pytest.raises(ClientError) as caught:
            next(events)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert 1 < time.monotonic() - frozen < 10


def test_a_call_of_the_asyncio_client_ends_when_its_server_freezes(process, impatient):
    async def main(address: str) -> float:
        async with AsyncClient(address, attempts=1) as client:
            events = client.stream_video("t2v", "a 3")
            assert isinstance(await anext(events), Accepted)
            frozen = freeze(process)
            with pytest.raises(ClientError) as caught:
                await anext(events)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        return time.monotonic() - frozen

    assert 1 < asyncio.run(main(process.stdout.readline().strip())) < 10


def test_a_call_goes_on_while_its_server_is_silent_but_alive(engine, impatient):
    engine.gate.clear()
    with Server(engine) as server, Client(server.address, attempts=1) as client:
        threading.Timer(2.5, engine.gate.set).start()
        assert client.generate_image("t2i", "a 3", seed=9).seed == 9


def test_clients_ask_no_more_often_than_servers_allow():
    options = dict(server_module._options(ServerSettings()))
    assert options["grpc.http2.min_ping_interval_without_data_ms"] <= client_module.KEEPALIVE_MS


@pytest.fixture
def pair():
    """Two engines, and one address of the two servers that have them."""
    engines = FakeEngine(), FakeEngine()
    with Server(engines[0]) as one, Server(engines[1]) as other:
        yield engines, f"ipv4:{one.address},{other.address}"


CALLS = 100  # after so many both servers of a pair are connected


def test_calls_go_round_the_servers_of_an_address(pair):
    engines, address = pair
    with Client(address) as client:
        for _ in range(CALLS):
            client.generate_image("t2i", "a 3")
    assert all(engine.admitted for engine in engines)


def test_calls_of_the_asyncio_client_go_round_the_servers_of_an_address(pair):
    engines, address = pair

    async def main() -> None:
        async with AsyncClient(address) as client:
            for _ in range(CALLS):
                await client.generate_image("t2i", "a 3")

    asyncio.run(main())
    assert all(engine.admitted for engine in engines)


@pytest.mark.parametrize("size", [1_000, 300_000, 4_000_000])
def test_calls_of_any_size_are_made_again(server, monkeypatch, size):
    """gRPC by itself makes none again that has sent more than 256 KiB."""
    tries, room = [], server.intake.room

    def full_twice():
        tries.append(1)
        if len(tries) < 3:
            raise QueueFullError("full", 0.01)
        return room()

    monkeypatch.setattr(server.intake, "room", full_twice)
    said = PngImagePlugin.PngInfo()
    said.add(b"puRe", bytes(size))  # a chunk that nobody reads
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG", pnginfo=said)
    with Client(server.address) as client:
        assert (
            client.generate_image("i2i", image=file.getvalue(), mask=[(0, 0, 4, 4)], seed=4).seed
            == 4
        )
    assert len(tries) == 3


def test_no_server():
    started = time.monotonic()
    with pytest.raises(ClientError, match="no server answered at 127.0.0.1:1 within 0.3 s"):
        Client("127.0.0.1:1", ready_timeout=0.3)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image": "picture.png"}, TypeError, "image is of type str"),
        ({"image": PICTURE.astype(np.float32)}, ValueError, "image is float32"),
        ({"image": PICTURE[..., 0]}, ValueError, r"not uint8 \[H, W, 3\]"),
        ({"mask": PICTURE[0, 0]}, ValueError, r"mask is uint8 \[3\], not uint8 \[H, W\]"),
        ({"mask": "mask.png"}, TypeError, "mask is of type str, not bytes, Path, an array or a l"),
        ({"mask": PICTURE}, ValueError, r"mask is uint8 \[8, 8, 3\], not uint8 \[H, W\]"),
        ({"mask": [(0, 0, 1, 1), (0, 2**31, 1, 1)]}, ValueError, "mask: box 1, .*2147483648"),
        ({"mask": [(0, 0, 1)]}, ValueError, r"mask: box 0, \(0, 0, 1\), is not \(left, top, w"),
        ({"mask": [(0, 0.5, 1, 1)]}, TypeError, "mask: box 0, "),
        ({"sketch": PICTURE * 1.0}, ValueError, r"sketch is float64 \[8, 8, 3\], not uint8"),
        ({"sketch": PICTURE[None, None]}, ValueError, r"not uint8 \[H, W, 3\] or \[F, H, W, 3\]"),
        ({"top_k": 2**40}, ValueError, "top_k 1099511627776 is not possible"),
        ({"seed": "x"}, TypeError, "seed 'x' is not possible"),
        ({"schedule": "spiral"}, ValueError, "schedule 'spiral' is not one of wave, raster"),
        ({"output_format": "bmp"}, ValueError, "'bmp' is not one of png, webp, gif, raw"),
        ({"topk": 3}, TypeError, "unknown option 'topk'"),
        ({"video": CLIP}, TypeError, "unknown option 'video'"),
    ],
)
def test_values_that_no_message_can_hold(options, error, message):
    with pytest.raises(error, match=message):
        image_request("t2i", "a 3", options)


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan")])
def test_deadlines_that_are_none(client, deadline):
    with pytest.raises(ValueError, match=f"deadline {deadline} is not a number of seconds above 0"):
        client.generate_image("t2i", "a 3", deadline=deadline)


@pytest.mark.parametrize("deadline", [None, float("inf"), 1e30])
def test_any_time_may_be_long_enough(client, deadline):
    assert client.generate_image("t2i", "a 3", deadline=deadline).pixels.flags.writeable


def test_prompts_are_text():
    with pytest.raises(TypeError, match="prompt None is not a str"):
        image_request("t2i", None, {})


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown task 'x2y'; choose one of t2i"):
        image_request("x2y", "", {})
    with pytest.raises(ValueError, match="'avi' is not one of webp, gif"):
        video_request("t2v", "a", {"animation_format": "avi"})
