"""Python clients: the same interface over a server (Client) and in this process (LocalClient).

    with Client("127.0.0.1:50051") as client:
        clip = client.generate_video("t2v", "a 3 moves left", seed=1)

Both go through the same messages and the same checks, so they give the same answers and errors.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from . import convert, replies, requests, results, selection, tls
from .convert import Job
from .core import Event, Frame, ModelInfo
from .engine_protocol import Engine
from .errors import NotFoundError
from .host import SEPARATOR
from .requests import ImageOptions, VideoOptions
from .results import ClipDone, ClipEvent, ClipResult, ImageEvent, ImageResult
from .scheduler import DEFAULT_QUEUE_SIZE, Scheduler

MOST_ATTEMPTS = 5  # that gRPC makes
# A server from which nothing has come for so long is asked whether it lives, while there are calls;
# if it does not answer in time, being frozen or gone without a word, they end as UNAVAILABLE.
# Servers allow a question every 10 s.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 30_000, 10_000
# Of a call, that gRPC keeps to send it again. Its default of 256 KiB is less than a picture may
# take as it is, and a call that is larger would never be made again.
RETRY_BYTES = 64 * 2**20
READY_SECONDS = 10.0  # that a server may take to answer at all
LOOKUP_SECONDS = 10.0  # that a server may take to say what it has loaded


def service_config(attempts: int) -> str:
    """How gRPC retries calls of nuwa.v1 and shares them out, as JSON; other clients may use it too.

    A server that is full says when to come back, which is kept to. Of an address that stands for
    several servers, each gets a call in turn.
    """
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2.0,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    retried = {"retryPolicy": policy} if attempts > 1 else {}
    return json.dumps(
        {
            # By default all calls would go to the first server that answers.
            "loadBalancingConfig": [{"round_robin": {}}],
            "methodConfig": [{"name": [{"service": "nuwa.v1.GenerationService"}], **retried}],
            # When most calls fail, retries would only make it worse.
            "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
        }
    )


def channel_options(address: str, attempts: int) -> list[tuple[str, int | str]]:
    """gRPC's, for a connection to a server at "host:port". ValueError for attempts out of range."""
    if not 1 <= attempts <= MOST_ATTEMPTS:
        raise ValueError(f"attempts {attempts} is not in [1, {MOST_ATTEMPTS}]")
    scheme = address.partition("://")[0]
    if scheme in ("http", "https", "grpc", "grpcs"):
        raise ValueError(f"address {address!r} is a URL; name HOST:PORT alone")
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.service_config", service_config(attempts)),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Which gRPC (1.85) goes by instead: without it, its default of a minute.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        # A request that waits is silent for long; with the default, gRPC would stop asking.
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        options.append(("grpc.enable_http_proxy", 0))
    return options


@dataclass(frozen=True)
class Access:
    """How a client gets in. tls: over TLS; ca: whom it trusts to sign the server's certificate,
    None for those the system trusts; certificate and key: its own, if the server asks for one, PEM.
    token: for a server that wants one; without TLS everybody on the way can read it.
    """

    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and key go together")
        if not self.tls and (self.ca or self.certificate):
            raise ValueError("certificates are for TLS; say tls too")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("the token is not printable ASCII")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for no TLS. ValueError or OSError for files that cannot be used."""
        if not self.tls:
            return None
        if self.certificate is not None and self.key is not None:
            tls.check_pair(self.certificate, self.key)
        if self.ca is not None:
            tls.check_authority(self.ca)
        files = [path and path.read_bytes() for path in (self.ca, self.key, self.certificate)]
        return grpc.ssl_channel_credentials(*files)


PLAIN = Access()


class ClientError(Exception):
    """The server's answer was an error, or there was no server.

    reason: as listed in generation.proto, or "" where the error is gRPC's own. code: the gRPC
    status. fields: path of each wrong field and what is wrong. metadata: further facts.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        fields: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.fields = fields or {}
        self.metadata = metadata or {}


class BaseClient(ABC):
    """What both clients do. `deadline` is in seconds from the call; None means no limit.

    ValueError for one that is no number above 0.
    """

    @abstractmethod
    def get_model(self, model: str = "") -> ModelInfo:
        """What is loaded. model: "NAME" or "NAME/VERSION", of a server that has several."""

    @abstractmethod
    def list_models(self) -> list[ModelInfo]:
        """All that is loaded, the default first."""

    @abstractmethod
    def close(self) -> None:
        """Ends what is under way."""

    @abstractmethod
    def _image(
        self, message: pb.GenerateImageRequest, deadline: float | None
    ) -> pb.GenerateImageResponse: ...

    @abstractmethod
    def _image_stream(
        self, message: pb.StreamImageRequest, deadline: float | None
    ) -> Iterator[pb.StreamImageResponse]: ...

    @abstractmethod
    def _video(
        self, message: pb.GenerateVideoRequest, deadline: float | None
    ) -> Iterator[pb.GenerateVideoResponse]: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate_image(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        deadline: float | None = None,
        **options: Unpack[ImageOptions],
    ) -> ImageResult:
        """One image, or several samples of it. Options: requests.ImageOptions."""
        message = requests.image_request(task, prompt, options)
        answer = self._image(message, requests.time_limit(deadline))
        return results.image_result(answer, message.sampling.sample_index)

    def stream_image(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        previews: int = 0,
        deadline: float | None = None,
        **options: Unpack[ImageOptions],
    ) -> Iterator[ImageEvent]:
        """The events of one image as they happen, for each of its samples if there are several.

        Accepted, Progress and Preview, an ImageSample, and after all samples ImageDone. previews:
        how often an unfinished image is shown. Scores come with ImageDone. Otherwise as
        generate_image; leaving the iterator early cancels.
        """
        image = requests.image_request(task, prompt, options)
        message = pb.StreamImageRequest(image=image, preview_count=previews)
        return results.image_events(self._image_stream(message, requests.time_limit(deadline)))

    def stream_video(
        self,
        task: Task | str,
        prompt: str = "",
        *,
        deadline: float | None = None,
        **options: Unpack[VideoOptions],
    ) -> Iterator[ClipEvent]:
        """The events of one clip as they happen: Accepted, Progress and Frame, then ClipDone.

        Holds no frames, so that a long clip can be written away as it comes. Several samples come
        mixed, or the best first if they are ranked: see sample_index. Options:
        requests.VideoOptions. The request is made when the first event is asked for, so an iterator
        that is never used costs nothing; the deadline counts from then. Leaving it early cancels.
        """
        message = requests.video_request(task, prompt, options)
        return results.clip_events(self._video(message, requests.time_limit(deadline)))

    def generate_video(
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
        for event in self.stream_video(task, prompt, deadline=deadline, **options):
            clip.take(event)
        return clip.result()


class ClipGathering:
    """The events of a clip, put together. on_event hears of each."""

    def __init__(self, on_event: Callable[[ClipEvent], object] | None) -> None:
        self._on_event = on_event
        self._frames: list[Frame] = []
        self._done: ClipDone | None = None

    def take(self, event: ClipEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)
        if isinstance(event, Frame):
            self._frames.append(event)
        elif isinstance(event, ClipDone):
            self._done = event

    def result(self) -> ClipResult:
        """ClientError if the clip is not whole."""
        if self._done is None:
            raise ClientError("the server ended the stream before it was done")
        return results.clip_result(self._frames, self._done)


class Client(BaseClient):
    """A connection to a server at "host:port". Raises ClientError if none answers in time.

    Of several servers behind one name ("dns:///host:port") each gets a call in turn; what changes
    models reaches just one of them.

    Calls that a server could not take, because it is busy or going down, are made again, up to
    `attempts` times in all; a stream only until its first event. Every request has a request_id, so
    that a retry gets the same result.
    """

    def __init__(
        self,
        address: str,
        *,
        ready_timeout: float = READY_SECONDS,
        attempts: int = 4,
        access: Access = PLAIN,
    ) -> None:
        options, credentials = channel_options(address, attempts), access.credentials()
        secure = credentials is not None
        self._metadata = access.metadata
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = generation_pb2_grpc.ModelServiceStub(self._channel)
        try:
            grpc.channel_ready_future(self._channel).result(ready_timeout)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise nobody_at(address, ready_timeout, tls=secure) from None

    def close(self) -> None:
        """Closes the connection; requests under way are cancelled."""
        self._channel.close()

    def get_model(self, model: str = "") -> ModelInfo:
        """What the server has loaded: the model of this name, or its first."""
        with server_errors():
            answer = self._stub.GetModel(
                pb.GetModelRequest(model=model), timeout=LOOKUP_SECONDS, metadata=self._metadata
            )
        return results.model_info(answer.model)

    def slot_count(self, model: str = "") -> int:
        """Sequences that the server decodes at a time."""
        with server_errors():
            answer = self._stub.GetModel(
                pb.GetModelRequest(model=model), timeout=LOOKUP_SECONDS, metadata=self._metadata
            )
        return int(answer.model.slot_count)

    def list_models(self) -> list[ModelInfo]:
        """All that the server has loaded, the default first."""
        with server_errors():
            answer = self._models.ListModels(
                pb.ListModelsRequest(), timeout=LOOKUP_SECONDS, metadata=self._metadata
            )
        return list(map(results.model_info, answer.models))

    def reload_model(self, model: str = "", *, keep_earlier: bool = False) -> ModelInfo:
        """Has a model's bundle loaded again; what it is now. Needs the scope "admin".

        keep_earlier: versions before stay, for requests that name them.
        """
        with server_errors():
            request = pb.ReloadModelRequest(model=model, keep_earlier=keep_earlier)
            answer = self._models.ReloadModel(request, metadata=self._metadata)
        return results.model_info(answer.model)

    def unload_model(self, model: str) -> None:
        """Has a model taken away, or one version of it. Needs the scope "admin"."""
        with server_errors():
            request = pb.UnloadModelRequest(model=model)
            self._models.UnloadModel(request, metadata=self._metadata)

    def _image(
        self, message: pb.GenerateImageRequest, deadline: float | None
    ) -> pb.GenerateImageResponse:
        with server_errors():
            return self._stub.GenerateImage(message, timeout=deadline, metadata=self._metadata)

    def _image_stream(
        self, message: pb.StreamImageRequest, deadline: float | None
    ) -> Iterator[pb.StreamImageResponse]:
        yield from _streamed(
            self._stub.StreamImage(message, timeout=deadline, metadata=self._metadata)
        )

    def _video(
        self, message: pb.GenerateVideoRequest, deadline: float | None
    ) -> Iterator[pb.GenerateVideoResponse]:
        yield from _streamed(
            self._stub.GenerateVideo(message, timeout=deadline, metadata=self._metadata)
        )


class LocalClient(BaseClient):
    """An engine in this process behind its own scheduler; errors come as they are raised."""

    def __init__(self, engine: Engine, *, queue_size: int = DEFAULT_QUEUE_SIZE) -> None:
        self._scheduler = Scheduler(engine, queue_size=queue_size)
        self._scheduler.start()

    def close(self) -> None:
        """Ends what is under way; the engine stays usable."""
        self._scheduler.close()

    def get_model(self, model: str = "") -> ModelInfo:
        """What the engine has loaded."""
        info = self._scheduler.engine.info
        if model.partition(SEPARATOR)[0] not in ("", info.name):
            raise NotFoundError(f"there is no model {model!r}; this engine has {info.name}")
        return info

    def list_models(self) -> list[ModelInfo]:
        """What the engine has loaded."""
        return [self.get_model()]

    def _image(
        self, message: pb.GenerateImageRequest, deadline: float | None
    ) -> pb.GenerateImageResponse:
        job = convert.read_image_request(message, self.get_model(message.model))
        return replies.image_response(job, self._events(job, deadline))

    def _image_stream(
        self, message: pb.StreamImageRequest, deadline: float | None
    ) -> Iterator[pb.StreamImageResponse]:
        with convert.inside("image"):
            job = convert.read_stream_image_request(message, self.get_model(message.image.model))
            yield from replies.image_responses(job, self._events(job, deadline))

    def _video(
        self, message: pb.GenerateVideoRequest, deadline: float | None
    ) -> Iterator[pb.GenerateVideoResponse]:
        job = convert.read_video_request(message, self.get_model(message.model))
        yield from replies.clip_responses(job, self._events(job, deadline))

    def _events(self, job: Job, deadline: float | None) -> Iterator[Event]:
        count = job.samples.count
        handle = self._scheduler.submit(job.generation, samples=count, timeout=deadline)
        return selection.events_of(handle, job.samples, self._scheduler.engine.rankers)


def nobody_at(address: str, seconds: float, *, tls: bool) -> ClientError:
    """gRPC does not tell whether there is none or whether they do not understand each other."""
    other = "one without TLS, or whose certificate is not trusted" if tls else "one that wants TLS"
    return ClientError(
        f"no server answered at {address} within {seconds:g} s; {other} would not either",
        code=grpc.StatusCode.UNAVAILABLE,
    )


def _streamed(call: Any) -> Iterator[Any]:
    """The messages of a call of the stub, which leaving early cancels."""
    try:
        with server_errors():
            yield from call
    finally:
        call.cancel()


@contextmanager
def server_errors() -> Iterator[None]:
    """Turns errors of gRPC raised inside, also in its asyncio API, into ClientErrors."""
    try:
        yield
    except grpc.RpcError as error:
        raise _client_error(error) from error


def _client_error(error: grpc.RpcError) -> ClientError:
    reason, fields, metadata = "", {}, {}
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = {each.field: each.description for each in bad.field_violations}
    return ClientError(
        error.details() or error.code().name,
        reason=reason,
        code=error.code(),
        fields=fields,
        metadata=metadata,
    )
