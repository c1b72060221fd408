"""The services of nuwa.v1: convert and delegate, in the threads of the gRPC server.

Raise plain exceptions, which interceptor.py turns into statuses. Ranking samples, encoding pictures
and writing to sockets happen here, never in the decode thread.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from functools import partial

import grpc

from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from . import convert, replies
from .errors import FieldError
from .host import SEPARATOR, Host, Loaded
from .intake import Intake, Origin


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def GenerateImage(
        self, request: pb.GenerateImageRequest, context: grpc.ServicerContext
    ) -> pb.GenerateImageResponse:
        intake = self._intake
        again = partial(intake.answered_again, context, time.perf_counter())

        def make() -> tuple[pb.GenerateImageResponse, Origin]:
            with intake.model(request.model, context) as loaded:
                job = convert.read_image_request(request, loaded.engine.info, intake.limits)
                events = intake.events(loaded, job, context, whole=True, instead="StreamImage")
                return replies.image_response(job, events), Origin.of(job, loaded)

        with intake.room():
            if not request.request_id:
                return make()[0]
            key = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
            return intake.answers.once(key, make, context.is_active, again)

    def StreamImage(
        self, request: pb.StreamImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamImageResponse]:
        intake, name = self._intake, request.image.model
        with intake.room(), convert.inside("image"), intake.model(name, context) as loaded:
            info = loaded.engine.info
            job = convert.read_stream_image_request(request, info, intake.limits)
            answers = replies.image_responses(job, intake.events(loaded, job, context))
            yield from intake.sending(context, job.request_id, answers)

    def GenerateVideo(
        self, request: pb.GenerateVideoRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateVideoResponse]:
        intake = self._intake
        with intake.room(), intake.model(request.model, context) as loaded:
            job = convert.read_video_request(request, loaded.engine.info, intake.limits)
            answers = replies.clip_responses(job, intake.events(loaded, job, context))
            yield from intake.sending(context, job.request_id, answers)

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        convert.refuse_unknown_fields(request)
        return pb.GetModelResponse(model=_message(self._intake.host.find(request.model)))


class ModelService(generation_pb2_grpc.ModelServiceServicer):
    def __init__(self, host: Host) -> None:
        self._host = host

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        convert.refuse_unknown_fields(request)
        return pb.ListModelsResponse(models=map(_message, self._host.loaded))

    def ReloadModel(
        self, request: pb.ReloadModelRequest, context: grpc.ServicerContext
    ) -> pb.ReloadModelResponse:
        convert.refuse_unknown_fields(request)
        if SEPARATOR in request.model:
            raise FieldError("model", f"model {request.model!r} has a version; name it without")
        loaded = self._host.reload(request.model, beside=request.keep_earlier)
        return pb.ReloadModelResponse(model=_message(loaded))

    def UnloadModel(
        self, request: pb.UnloadModelRequest, context: grpc.ServicerContext
    ) -> pb.UnloadModelResponse:
        convert.refuse_unknown_fields(request)
        if not request.model:
            raise FieldError("model", "model is empty; say which is to be taken away")
        self._host.unload(request.model)
        return pb.UnloadModelResponse()


def _message(loaded: Loaded) -> pb.Model:
    message = replies.model_message(loaded.engine.info, loaded.engine.slots)
    message.name, message.version = loaded.name, loaded.version
    return message
