"""inference.GRPCInferenceService: the Open Inference Protocol on the engine of nuwa.v1.

Raises plain exceptions, which interceptor.py turns into statuses; but within a stream an error is
an answer of its own, as in Triton, unless the client asks for statuses there too.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import numpy as np

from nuwa.inference import grpc_service_pb2 as pb
from nuwa.inference import grpc_service_pb2_grpc
from nuwa.spec.tasks import Task

from .. import media
from ..convert import Job, refuse_unknown_fields
from ..core import CancelledError, Done, Event, Frame, Timings
from ..errors import FieldError, NotFoundError, NotReadyError
from ..intake import Intake
from .models import TaskModel, find, models_of
from .requests import (
    InferJob,
    check_index,
    check_load,
    check_unload,
    read_request,
    renamed,
)
from .stream import Failure, Stream
from .tensors import add_output, set_parameters

log = logging.getLogger("nuwa.runtime")

NAME = "nuwa"
FINAL = "triton_final_response"
WANTS_STATUS = "triton_grpc_error"  # metadata: end the stream with a status at the first error


class InferenceService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """live: whether the server is well; ready: whether it takes requests; told(error, request_id,
    peer): what is kept of an error, as one whose text is the message for clients.
    """

    def __init__(
        self,
        intake: Intake,
        *,
        live: Callable[[], bool],
        ready: Callable[[], bool],
        told: Callable[[Exception, str, str], Exception],
    ) -> None:
        self._intake, self._host = intake, intake.host
        self._live, self._ready, self._told = live, ready, told
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self._dismissed = False

    def dismiss(self) -> None:
        """Ends streams as soon as what they have asked for is answered."""
        with self._lock:
            self._dismissed = True
            streams = list(self._streams)
        for stream in streams:
            stream.dismiss()

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._live())

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready())

    def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.ServicerContext
    ) -> pb.ModelReadyResponse:
        try:
            find(self._host, request.name, request.version)
        except (NotFoundError, NotReadyError):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    def ServerMetadata(
        self, request: Any, context: grpc.ServicerContext
    ) -> pb.ServerMetadataResponse:
        refuse_unknown_fields(request)
        version = importlib.metadata.version("nuwa-runtime")
        extensions = ["model_configuration", "statistics", "model_repository"]
        return pb.ServerMetadataResponse(name=NAME, version=version, extensions=extensions)

    def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        refuse_unknown_fields(request)
        return find(self._host, request.name, request.version).metadata

    def ModelConfig(
        self, request: pb.ModelConfigRequest, context: grpc.ServicerContext
    ) -> pb.ModelConfigResponse:
        refuse_unknown_fields(request)
        return pb.ModelConfigResponse(config=find(self._host, request.name, request.version).config)

    def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> pb.ModelStatisticsResponse:
        refuse_unknown_fields(request)
        models = models_of(self._host)
        if request.name:
            models = [find(self._host, request.name, request.version)]
        return pb.ModelStatisticsResponse(model_stats=[self._statistics(each) for each in models])

    def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: grpc.ServicerContext
    ) -> pb.RepositoryIndexResponse:
        check_index(request)
        ready = self._ready()
        response = pb.RepositoryIndexResponse()
        for each in models_of(self._host) if ready or not request.ready else ():
            state = "READY" if ready else "UNAVAILABLE"
            response.models.add(name=each.name, version=str(each.loaded.version), state=state)
        return response

    def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> pb.RepositoryModelLoadResponse:
        check_load(request)
        with renamed():
            self._host.reload(self._bundle(request.model_name))
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> pb.RepositoryModelUnloadResponse:
        check_unload(request)
        name = request.model_name
        bundle = self._bundle(name)
        if bundle != name and any(each.name == bundle for each in self._host.loaded):
            raise FieldError(
                "model_name",
                f"{name!r} is one of the models of {bundle!r}, which come and go together; to take "
                f"all of them away, unload {bundle!r}",
            )
        self._host.unload(bundle)
        return pb.RepositoryModelUnloadResponse()

    def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> pb.ModelInferResponse:
        with self._call(request, context) as model:
            job = self._read(request, model)
            if model.task.is_video and job.job.samples.returned > 1:
                raise FieldError(
                    "parameters.return_count",
                    f"one answer has room for one clip, not for {job.job.samples.returned}; set "
                    "return_count to 1 (with rank_by), or use ModelStreamInfer",
                )
            frames, done = [], None
            instead = "ModelStreamInfer" if model.task.is_video else ""
            for event in self._events(model, job, context, whole=True, instead=instead):
                if isinstance(event, Frame):
                    frames.append(event)
                elif isinstance(event, Done):
                    done = event
            assert done is not None, "a request that does not fail is done"
            return _whole(model, job, frames, done)

    def ModelStreamInfer(
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[pb.ModelStreamInferResponse]:
        strict = dict(context.invocation_metadata()).get(WANTS_STATUS) == "true"
        stream = Stream(self._answers, context, partial(self._kept, context))
        with self._lock:
            self._streams.add(stream)
            dismissed = self._dismissed
        try:
            stream.start(request_iterator)
            if dismissed:
                stream.dismiss()
            told = self._told_of(stream.answers(), context, strict)
            yield from self._intake.sending(context, "a stream", told)
        finally:
            stream.close()
            with self._lock:
                self._streams.discard(stream)

    def _kept(self, context: grpc.ServicerContext, error: Exception, request_id: str) -> Exception:
        """As `told`. The end of the call itself is told once, not of each request in it."""
        if isinstance(error, CancelledError) and not context.is_active():
            return type(error)(str(error))  # without the traceback
        return self._told(error, request_id, context.peer())

    def _told_of(
        self, answers: Iterator[Any], context: grpc.ServicerContext, strict: bool
    ) -> Iterator[pb.ModelStreamInferResponse]:
        for answer in answers:
            if not isinstance(answer, Failure):
                yield pb.ModelStreamInferResponse(infer_response=answer)
            elif strict or not context.is_active():
                raise answer.error
            else:
                failed = pb.ModelInferResponse(id=answer.request_id)
                set_parameters(failed.parameters, {FINAL: True})
                yield pb.ModelStreamInferResponse(
                    error_message=str(answer.error), infer_response=failed
                )

    def _answers(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ModelInferResponse]:
        """Those to one request of a stream."""
        with self._call(request, context) as model:
            job = self._read(request, model)
            if model.task.is_video:
                yield from _by_frame(model, job, self._events(model, job, context))
            else:
                yield from _by_image(model, job, self._events(model, job, context, whole=True))

    @contextmanager
    def _call(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> Iterator[TaskModel]:
        """Room for a call, and the model that it is to."""
        model = find(self._host, request.model_name, request.model_version)
        named = model.loaded.title if request.model_version else model.loaded.name
        with (
            self._intake.room(),
            self._intake.model(named, context) as loaded,
        ):  # which may be a later version by now
            yield replace(model, loaded=loaded)

    def _read(self, request: pb.ModelInferRequest, model: TaskModel) -> InferJob:
        return read_request(request, model, model.loaded.engine.info, self._intake.limits)

    def _events(
        self,
        model: TaskModel,
        job: InferJob,
        context: grpc.ServicerContext,
        *,
        whole: bool = False,
        instead: str = "",
    ) -> Iterator[Event]:
        with renamed():
            return self._intake.events(
                model.loaded, job.job, context, job.timeout, whole=whole, instead=instead
            )

    def _bundle(self, name: str) -> str:
        """The name of the bundle that a model belongs to, which may also be named itself."""
        if any(each.name == name for each in self._host.loaded):
            return name
        for task in Task:  # also of one that was taken away
            if name.endswith(f"_{task}"):
                return name.removesuffix(f"_{task}")
        return name

    def _statistics(self, model: TaskModel) -> pb.ModelStatistics:
        found = self._intake.metrics.statistics[model.loaded.title, model.task]
        message = pb.ModelStatistics(
            name=model.name,
            version=str(model.loaded.version),
            last_inference=round(found.last_time * 1e3),
            inference_count=found.succeeded,
            execution_count=found.seconds.steps,
        )
        stats = message.inference_stats
        for duration, count, seconds in (
            (stats.success, found.succeeded, found.seconds.total),
            (stats.fail, found.failed, found.failed_seconds),
            (stats.queue, found.succeeded, found.seconds.queue),
            (stats.compute_input, found.succeeded, found.seconds.encode),
            (stats.compute_infer, found.succeeded, found.seconds.decode),
            (stats.compute_output, found.succeeded, found.seconds.pixels),
        ):
            duration.count, duration.ns = count, round(seconds * 1e9)
        return message


def _response(model: TaskModel, job: Job, **parameters: Any) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=str(model.loaded.version), id=job.request_id
    )
    set_parameters(response.parameters, {"seed": job.generation.seed} | parameters)
    return response


def _whole(
    model: TaskModel, job: InferJob, frames: list[Frame], done: Done
) -> pb.ModelInferResponse:
    """The answer with all images, or all frames of the clip; best first, or by their numbers."""
    if not done.scores:
        frames.sort(key=lambda frame: (frame.sample_index, frame.index))
    indices = list(dict.fromkeys(frame.sample_index for frame in frames))
    parameters: dict[str, Any] = {"sample_index": indices[0], **_times(done.timings)}
    if done.scores:
        parameters["score"] = done.scores[indices[0]]
    response = _response(model, job.job, **parameters)
    _add(response, model, job, frames)
    return response


def _by_image(
    model: TaskModel, job: InferJob, events: Iterator[Event]
) -> Iterator[pb.ModelInferResponse]:
    frames: list[Frame] = []
    for event in events:
        if isinstance(event, Frame):
            frames.append(event)
        elif isinstance(event, Done):
            response = _whole(model, job, frames, event)
            set_parameters(response.parameters, {FINAL: not job.empty_final})
            yield response
            if job.empty_final:
                yield _response(model, job.job, **{FINAL: True})


def _by_frame(
    model: TaskModel, job: InferJob, events: Iterator[Event]
) -> Iterator[pb.ModelInferResponse]:
    left = job.job.samples.returned * job.job.generation.frame_count
    for event in events:
        if isinstance(event, Frame):
            left -= 1
            response = _response(
                model,
                job.job,
                sample_index=event.sample_index,
                frame_index=event.index,
                **{FINAL: left == 0 and not job.empty_final},
            )
            _add(response, model, job, [event])
            yield response
        elif isinstance(event, Done) and job.empty_final:
            yield _response(model, job.job, **{FINAL: True}, **_times(event.timings))


def _add(
    response: pb.ModelInferResponse, model: TaskModel, job: InferJob, frames: list[Frame]
) -> None:
    made = "VIDEO" if model.task.is_video else "IMAGE"
    pixels = np.stack([frame.pixels for frame in frames])
    add_output(response, made, media.upscale(pixels, job.job.output.scale))
    if job.tokens:
        add_output(response, "TOKENS", np.stack([frame.tokens for frame in frames]))


def _times(timings: Timings) -> dict[str, int]:
    names = ("queue", "encode", "decode", "pixels", "total")
    return {f"{name}_ns": round(getattr(timings, name) * 1e9) for name in names}
