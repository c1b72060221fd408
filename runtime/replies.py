"""Events and results of core.py as messages of nuwa.v1: scaled, encoded, with their units.

Pure functions; `convert.py` goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from nuwa.v1 import generation_pb2 as pb

from . import media
from .convert import TASK_VALUES, Job, OutputOptions
from .core import Accepted, Done, Event, Frame, ModelInfo, Pixels, Progress, Timings

FORMATS = {
    "png": pb.IMAGE_FORMAT_PNG,
    "webp": pb.IMAGE_FORMAT_WEBP,
    "gif": pb.IMAGE_FORMAT_GIF,
    "raw": pb.IMAGE_FORMAT_RAW_RGB,
}
ANIMATION_FORMATS = {"webp": pb.ANIMATION_FORMAT_WEBP, "gif": pb.ANIMATION_FORMAT_GIF}


def image_response(job: Job, events: Iterator[Event]) -> pb.GenerateImageResponse:
    """Waits for the image: the answer to GenerateImage."""
    response = pb.GenerateImageResponse(request_id=job.request_id, seed=job.generation.seed)
    for event in events:
        match event:
            case Frame():
                response.frame.CopyFrom(frame_message(event, job.output))
            case Done():
                response.timings.CopyFrom(timings_message(event.timings))
    return response


def clip_responses(job: Job, events: Iterator[Event]) -> Iterator[pb.GenerateVideoResponse]:
    """The stream that answers GenerateVideo, one message for each event."""
    frames: list[Pixels] = []
    for event in events:
        match event:
            case Accepted():
                yield pb.GenerateVideoResponse(accepted=_accepted(job, event))
            case Progress():
                yield pb.GenerateVideoResponse(progress=_progress(event))
            case Frame():
                frames.append(event.pixels)
                frame = frame_message(event, job.output)
                yield pb.GenerateVideoResponse(frame=pb.FrameEvent(frame=frame))
            case Done():
                yield pb.GenerateVideoResponse(done=_done(job, frames, event.timings))


def _accepted(job: Job, event: Accepted) -> pb.AcceptedEvent:
    return pb.AcceptedEvent(
        request_id=job.request_id,
        seed=job.generation.seed,
        frame_count=job.generation.frame_count,
        queue_duration=_duration(event.queue_seconds),
    )


def _progress(event: Progress) -> pb.ProgressEvent:
    return pb.ProgressEvent(
        decoded_position_count=event.positions_done,
        total_position_count=event.positions_total,
        decoded_frame_count=event.frames_done,
        total_frame_count=event.frames_total,
    )


def _done(job: Job, frames: list[Pixels], timings: Timings) -> pb.DoneEvent:
    done = pb.DoneEvent(
        request_id=job.request_id,
        seed=job.generation.seed,
        timings=timings_message(timings),
    )
    output = job.output
    if output.animation:
        clip = media.upscale(np.stack(frames), output.scale)
        done.animation = media.encode_animation(clip, output.animation, output.frames_per_second)
        done.animation_format = ANIMATION_FORMATS[output.animation]
    return done


def frame_message(frame: Frame, output: OutputOptions) -> pb.Frame:
    """One frame, scaled and encoded."""
    pixels = media.upscale(frame.pixels, output.scale)
    height, width, _ = pixels.shape
    message = pb.Frame(
        index=frame.index,
        data=media.encode_picture(pixels, output.kind),
        format=FORMATS[output.kind],
        height=height,
        width=width,
    )
    if output.include_tokens:
        message.token_grid.CopyFrom(_token_grid(frame.tokens))
    return message


def timings_message(timings: Timings) -> pb.Timings:
    """Seconds as durations."""
    return pb.Timings(
        queue_duration=_duration(timings.queue),
        encode_duration=_duration(timings.encode),
        decode_duration=_duration(timings.decode),
        pixel_duration=_duration(timings.pixels),
        total_duration=_duration(timings.total),
        step_count=timings.steps,
    )


def model_message(info: ModelInfo, slots: int) -> pb.Model:
    """What is loaded."""
    return pb.Model(
        name=info.name,
        bundle_hash=info.bundle_hash,
        tasks=[TASK_VALUES[task] for task in info.tasks],
        height=info.height,
        width=info.width,
        max_frame_count=info.max_frames,
        codebook_size=info.codebook_size,
        parameter_count=info.parameter_count,
        precision=info.precision,
        license=info.licence,
        backend=info.backend,
        slot_count=slots,
    )


def _token_grid(tokens: npt.NDArray[np.int32]) -> pb.TokenGrid:
    height, width = tokens.shape
    return pb.TokenGrid(tokens=tokens.reshape(-1).tolist(), height=height, width=width)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
