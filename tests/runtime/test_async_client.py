"""The asyncio client over the fake engine: the same answers as the other one's."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from nuwa.runtime.async_client import AsyncClient
from nuwa.runtime.client import Client, ClientError
from nuwa.runtime.core import Accepted, Frame, Preview, Progress
from nuwa.runtime.results import ClipDone, ImageDone, ImageSample
from nuwa.runtime.server import Server

from .fake_engine import FakeEngine, expected_pixels, expected_tokens
from .messages import wait_until


def test_it_gives_what_the_other_client_gives(server):
    async def main():
        async with AsyncClient(server.address) as client:
            image = await client.generate_image("t2i", "a 3", seed=9, include_tokens=True)
            clip = await client.generate_video("t2v", "a 3", seed=9, frame_count=3)
            return image, clip, await client.get_model()

    image, clip, model = asyncio.run(main())
    assert (image.pixels == expected_pixels(expected_tokens(9, 0))).all()
    assert (image.tokens == expected_tokens(9, 0)).all()
    expected = np.stack([expected_pixels(expected_tokens(9, f)) for f in range(3)])
    assert (clip.frames == expected).all() and clip.seed == 9
    with Client(server.address) as client:
        assert client.get_model() == model


def test_events_come_as_they_happen(server):
    async def main():
        async with AsyncClient(server.address) as client:
            image = [e async for e in client.stream_image("t2i", "a 3", previews=2)]
            clip = [e async for e in client.stream_video("t2v", "a 3", frame_count=2)]
            return image, clip

    image, clip = asyncio.run(main())
    assert {type(each) for each in image} == {Accepted, Progress, Preview, ImageSample, ImageDone}
    assert {type(each) for each in clip} == {Accepted, Progress, Frame, ClipDone}
    assert isinstance(clip[-1], ClipDone) and isinstance(image[-1], ImageDone)


def test_many_at_a_time(server, engine):
    engine.slots = 4

    async def main():
        async with AsyncClient(server.address, attempts=5) as client:
            calls = [client.generate_image("t2i", "a 3", seed=seed) for seed in range(3)]
            return await asyncio.gather(*calls)

    for seed, image in enumerate(asyncio.run(main())):
        assert (image.pixels == expected_pixels(expected_tokens(seed, 0))).all()


def test_errors_are_those_of_the_other_client(server):
    async def main():
        async with AsyncClient(server.address) as client:
            with pytest.raises(ClientError, match="prompt is empty") as image:
                await client.generate_image("t2i")
            with pytest.raises(ClientError, match="frame_count 99") as clip:
                await client.generate_video("t2v", "a 3", frame_count=99)
        return image.value, clip.value

    image, clip = asyncio.run(main())
    assert list(image.fields) == ["prompt"] and image.reason == "INVALID_REQUEST"
    assert clip.code is grpc.StatusCode.INVALID_ARGUMENT and "frame_count" in clip.fields


def test_a_deadline_and_a_cancelled_task_stop_the_request(server, engine):
    engine.gate.clear()

    async def main():
        async with AsyncClient(server.address) as client:
            with pytest.raises(ClientError) as late:
                await client.generate_image("t2i", "a 3", deadline=0.2)
            task = asyncio.create_task(client.generate_video("t2v", "a 3"))
            while not server.scheduler.active:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return late.value

    assert asyncio.run(main()).code is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.gate.set()
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)
    assert engine.steps < 40


def test_leaving_a_stream_cancels(server, engine, monkeypatch):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda until=None: time.sleep(0.001) or step())

    async def main():
        async with AsyncClient(server.address) as client:
            async for event in client.stream_video(
                "v2v", frame_count=900, video=np.zeros((8, 8, 3), np.uint8)
            ):
                if isinstance(event, Frame):
                    break

    asyncio.run(main())
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)
    assert engine.steps < 3600


def test_models_are_listed_loaded_again_and_taken_away():
    def opened(path: Path) -> FakeEngine:
        engine = FakeEngine()
        engine.info = dataclasses.replace(engine.info, name=path.name)
        return engine

    async def main(address: str) -> None:
        async with AsyncClient(address, attempts=1) as client:
            listed = await client.list_models()
            assert [(each.name, each.version) for each in listed] == [("small", 1), ("large", 1)]
            assert (await client.reload_model("large")).version == 2
            assert (await client.get_model("large")).version == 2
            assert (await client.reload_model()).name == "small", "the default"
            with pytest.raises(ClientError, match="name it without") as caught:
                await client.reload_model("large/2")
            assert "model" in caught.value.fields
            await client.unload_model("small")
            assert [each.name for each in await client.list_models()] == ["large"]
            with pytest.raises(ClientError, match="no model 'small'") as caught:
                await client.unload_model("small")
            assert caught.value.code is grpc.StatusCode.NOT_FOUND

    with Server(open_engine=opened) as server:
        for name in ("small", "large"):
            server.load("", Path("b") / name)
        asyncio.run(main(server.address))


def test_it_may_be_opened_and_closed_by_hand(server):
    async def main():
        client = AsyncClient(server.address)
        with pytest.raises(
            RuntimeError, match=r"not connected: `async with AsyncClient\(\.\.\.\)`"
        ):
            await client.generate_image("t2i", "a 3")
        await client.connect()
        image = await client.generate_image("t2i", "a 3", seed=9, deadline=float("inf"))
        with pytest.raises(ValueError, match="deadline 0 is not a number of seconds above 0"):
            await client.generate_image("t2i", "a 3", deadline=0)
        await client.close()
        return image.pixels

    assert (asyncio.run(main()) == expected_pixels(expected_tokens(9, 0))).all()


def test_nobody_there():
    async def main():
        async with AsyncClient("127.0.0.1:1", ready_timeout=0.2):
            pass

    with pytest.raises(ClientError, match="no server answered at 127.0.0.1:1 within 0.2 s"):
        asyncio.run(main())
