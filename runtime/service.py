"""nuwa.v1.GenerationService: converts and delegates, in the threads of the gRPC server.

Raises plain exceptions, which interceptor.py turns into statuses. Ranking samples, encoding
pictures and writing to sockets happen here, never in the decode thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import grpc

from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from . import convert, replies
from .answers import Answers
from .intake import Intake


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._answers = Answers()

    def GenerateImage(
        self, request: pb.GenerateImageRequest, context: grpc.ServicerContext
    ) -> pb.GenerateImageResponse:
        def make() -> pb.GenerateImageResponse:
            job = convert.read_image_request(request, intake.info, intake.limits)
            return replies.image_response(job, intake.events(job, context))

        intake = self._intake
        with intake.call():
            if not request.request_id:
                return make()
            key = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
            return self._answers.once(key, make, context.is_active)

    def StreamImage(
        self, request: pb.StreamImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamImageResponse]:
        intake = self._intake
        with intake.call(), convert.inside("image"):
            job = convert.read_stream_image_request(request, intake.info, intake.limits)
            yield from replies.image_responses(job, intake.events(job, context))

    def GenerateVideo(
        self, request: pb.GenerateVideoRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateVideoResponse]:
        intake = self._intake
        with intake.call():
            job = convert.read_video_request(request, intake.info, intake.limits)
            yield from replies.clip_responses(job, intake.events(job, context))

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        convert.refuse_unknown_fields(request)
        engine = self._intake.engine
        return pb.GetModelResponse(model=replies.model_message(engine.info, engine.slots))
