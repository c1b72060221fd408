"""The client for asyncio: as client.Client, with `await` and `async for`.

    async with AsyncClient("127.0.0.1:50051") as client:
        clip = await client.generate_video("t2v", "a 3 moves left", seed=1)

Cancelling a task, or leaving a stream early, cancels the request on the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio

from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from . import requests, results
from .client import (
    LOOKUP_SECONDS,
    PLAIN,
    READY_SECONDS,
    Access,
    ClipGathering,
    channel_options,
    nobody_at,
    server_errors,
)
from .core import ModelInfo
from .requests import ImageOptions, VideoOptions
from .results import ClipEvent, ClipResult, ImageEvent, ImageResult


class AsyncClient:
    """A connection to a server at "host:port", made on entering, or by connect() and then to be
    closed; retries and takes turns among several servers as client.Client.

    Entering raises ClientError if no server answers within `ready_timeout` seconds. `deadline` is
    in seconds from the call; None means no limit.
    """

    def __init__(
        self,
        address: str,
        *,
        ready_timeout: float = READY_SECONDS,
        attempts: int = 4,
        access: Access = PLAIN,
    ) -> None:
        self._address, self._ready_timeout, self._access = address, ready_timeout, access
        self._metadata = access.metadata
        self._options = channel_options(address, attempts)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def connect(self) -> None:
        """Once, before the first call. ClientError if no server answers in time."""
        credentials = self._access.credentials()
        secure = credentials is not None
        if secure:
            channel = grpc.aio.secure_channel(self._address, credentials, self._options)
        else:
            channel = grpc.aio.insecure_channel(self._address, self._options)
        try:
            async with asyncio.timeout(self._ready_timeout):
                await channel.channel_ready()
        except BaseException as error:
            await channel.close()
            if isinstance(error, TimeoutError):
                raise nobody_at(self._address, self._ready_timeout, tls=secure) from None
            raise
        self._channel = channel

    async def close(self) -> None:
        """Closes the connection; requests under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    def _bounds(self, deadline: float | None) -> dict[str, Any]:
        return {"timeout": requests.time_limit(deadline), "metadata": self._metadata}

    @property
    def _stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(self._connected)

    @property
    def _models(self) -> generation_pb2_grpc.ModelServiceStub:
        return generation_pb2_grpc.ModelServiceStub(self._connected)

    @property
    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise RuntimeError("not connected: `async with AsyncClient(...)`, or connect() first")
        return self._channel

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def get_model(self, model: str = "") -> ModelInfo:
        """What the server has loaded: the model of this name, or its first."""
        with server_errors():
            answer = await self._stub.GetModel(
                pb.GetModelRequest(model=model), timeout=LOOKUP_SECONDS, metadata=self._metadata
            )
        return results.model_info(answer.model)

    async def list_models(self) -> list[ModelInfo]:
        """All that the server has loaded, the default first."""
        with server_errors():
            answer = await self._models.ListModels(
                pb.ListModelsRequest(), timeout=LOOKUP_SECONDS, metadata=self._metadata
            )
        return list(map(results.model_info, answer.models))

    async def reload_model(self, model: str = "", *, keep_earlier: bool = False) -> ModelInfo:
        """Has a model's bundle loaded again; what it is now. Needs the scope "admin".

        keep_earlier: versions before stay, for requests that name them.
        """
        with server_errors():
            request = pb.ReloadModelRequest(model=model, keep_earlier=keep_earlier)
            answer = await self._models.ReloadModel(request, metadata=self._metadata)
        return results.model_info(answer.model)

    async def unload_model(self, model: str) -> None:
        """Has a model taken away, or one version of it. Needs the scope "admin"."""
        with server_errors():
            request = pb.UnloadModelRequest(model=model)
            await self._models.UnloadModel(request, metadata=self._metadata)

    async def generate_image(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        deadline: float | None = None,
        **options: Unpack[ImageOptions],
    ) -> ImageResult:
        """One image, or several samples of it. Options: requests.ImageOptions."""
        message = requests.image_request(task, prompt, options)
        with server_errors():
            answer = await self._stub.GenerateImage(message, **self._bounds(deadline))
        return results.image_result(answer, message.sampling.sample_index)

    async def stream_image(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        previews: int = 0,
        deadline: float | None = None,
        **options: Unpack[ImageOptions],
    ) -> AsyncIterator[ImageEvent]:
        """The events of one image as they happen; see client.BaseClient.stream_image."""
        image = requests.image_request(task, prompt, options)
        message = pb.StreamImageRequest(image=image, preview_count=previews)
        call = self._stub.StreamImage(message, **self._bounds(deadline))
        reader = results.ImageReader()
        try:
            with server_errors():
                async for answer in call:
                    for event in reader.read(answer):
                        yield event
        finally:
            call.cancel()

    async def stream_video(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        deadline: float | None = None,
        **options: Unpack[VideoOptions],
    ) -> AsyncIterator[ClipEvent]:
        """The events of one clip as they happen; see client.BaseClient.stream_video."""
        message = requests.video_request(task, prompt, options)
        call = self._stub.GenerateVideo(message, **self._bounds(deadline))
        reader = results.ClipReader()
        try:
            with server_errors():
                async for answer in call:
                    for event in reader.read(answer):
                        yield event
        finally:
            call.cancel()

    async def generate_video(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        deadline: float | None = None,
        on_event: Callable[[ClipEvent], object] | None = None,
        **options: Unpack[VideoOptions],
    ) -> ClipResult:
        """One clip, or several samples of it, all in memory. Options: requests.VideoOptions.

        on_event hears of each event.
        """
        clip = ClipGathering(on_event)
        async for event in self.stream_video(task, prompt, deadline=deadline, **options):
            clip.take(event)
        return clip.result()
