"""nuwa.v1.GenerationService: converts and delegates, in the threads of the gRPC server.

Raises plain exceptions, which interceptor.py turns into statuses. Ranking samples, encoding
pictures and writing to sockets happen here, never in the decode thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from . import convert, replies, selection
from .convert import Job
from .core import Done, Event, QueueFullError
from .handle import Handle
from .media import DEFAULT_LIMITS, Limits
from .scheduler import Scheduler

log = logging.getLogger("nuwa.runtime")

YEAR_SECONDS = 365 * 24 * 3600.0


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """max_calls: generations in this class at a time, waiting ones and slow readers included.

    More are refused as QueueFullError, so that the server's threads never run out: with none left,
    health checks would go unanswered and refusals would wait behind what they refuse.
    """

    def __init__(
        self, scheduler: Scheduler, *, max_calls: int, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._calls = threading.BoundedSemaphore(max_calls)

    def GenerateImage(
        self, request: pb.GenerateImageRequest, context: grpc.ServicerContext
    ) -> pb.GenerateImageResponse:
        with self._call():
            job = convert.read_image_request(request, self._scheduler.engine.info, self._limits)
            return replies.image_response(job, self._events(job, context))

    def StreamImage(
        self, request: pb.StreamImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamImageResponse]:
        with self._call():
            info = self._scheduler.engine.info
            with convert.inside("image"):
                job = convert.read_stream_image_request(request, info, self._limits)
                yield from replies.image_responses(job, self._events(job, context))

    def GenerateVideo(
        self, request: pb.GenerateVideoRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateVideoResponse]:
        with self._call():
            job = convert.read_video_request(request, self._scheduler.engine.info, self._limits)
            yield from replies.clip_responses(job, self._events(job, context))

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        convert.refuse_unknown_fields(request)
        engine = self._scheduler.engine
        return pb.GetModelResponse(model=replies.model_message(engine.info, engine.slots))

    @contextmanager
    def _call(self) -> Iterator[None]:
        if not self._calls.acquire(blocking=False):
            raise QueueFullError("the server has as many calls as it can hold")
        try:
            yield
        finally:
            self._calls.release()

    def _events(self, job: Job, context: grpc.ServicerContext) -> Iterator[Event]:
        handle = self._submit(job, context)
        rankers = self._scheduler.engine.rankers
        return _logged(job, selection.events_of(handle, job.samples, rankers))

    def _submit(self, job: Job, context: grpc.ServicerContext) -> Handle:
        remaining = context.time_remaining()  # centuries when the client set no deadline
        timeout = remaining if remaining is not None and remaining < YEAR_SECONDS else None
        handle = self._scheduler.submit(job.generation, samples=job.samples.count, timeout=timeout)
        if not context.add_callback(handle.cancel):
            handle.cancel()  # the client left before there was something to cancel
        return handle


def _logged(job: Job, events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, Done):
            times = event.timings
            log.info(
                "%s %s: %d frames, %d steps, %.3f s (queue %.3f, encode %.3f, decode %.3f, "
                "pixels %.3f, ranking %.3f)",
                job.request_id,
                job.generation.task,
                job.generation.frame_count * job.samples.count,
                times.steps,
                times.total,
                times.queue,
                times.encode,
                times.decode,
                times.pixels,
                times.ranking,
            )
        yield event
