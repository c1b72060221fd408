"""Events and results of core.py as messages of nuwa.v1: scaled, encoded, with their units.

Pure functions; `convert.py` goes the other way. Samples come in the order in which they are to be
returned, or mixed where they are not ranked (selection.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from nuwa.spec.palette import voc_palette
from nuwa.spec.sampling import Sampling
from nuwa.v1 import generation_pb2 as pb

from . import media
from .convert import TASK_VALUES, Job, OutputOptions
from .core import (
    Accepted,
    Done,
    Event,
    Frame,
    ModelInfo,
    Pixels,
    Preview,
    Progress,
    Timings,
)
from .samples import MAX_SAMPLES

CHUNK_BYTES = 2**20  # of a frame or file, in one message of a stream

FORMATS = {
    "png": pb.IMAGE_FORMAT_PNG,
    "webp": pb.IMAGE_FORMAT_WEBP,
    "gif": pb.IMAGE_FORMAT_GIF,
    "raw": pb.IMAGE_FORMAT_RAW_RGB,
}
ANIMATION_FORMATS = {"webp": pb.ANIMATION_FORMAT_WEBP, "gif": pb.ANIMATION_FORMAT_GIF}


def image_response(job: Job, events: Iterator[Event]) -> pb.GenerateImageResponse:
    """Waits for the image, or for all samples of it: the answer to GenerateImage."""
    response = pb.GenerateImageResponse(request_id=job.request_id, seed=job.generation.seed)
    frames: list[Frame] = []
    for event in events:
        match event:
            case Frame():
                frames.append(event)
            case Done():
                response.scores.extend(_scores(event))
                if not event.scores:
                    frames.sort(key=lambda frame: frame.sample_index)
                encoding = _Stopwatch()
                with encoding:
                    _add_images(response, job, frames, event.scores)
                response.timings.CopyFrom(encoding.timings(event))
    return response


def image_responses(job: Job, events: Iterator[Event]) -> Iterator[pb.StreamImageResponse]:
    """The stream that answers StreamImage, one message for each event.

    Scores of samples are in the last one.
    """
    best: int | None = None if job.samples.rank_by else job.generation.sample_index
    encoding = _Stopwatch()
    for event in events:
        match event:
            case Accepted():
                yield pb.StreamImageResponse(accepted=_accepted(job, event))
            case Progress():
                yield pb.StreamImageResponse(progress=_progress(event))
            case Preview():
                for preview in _previews(job, event):
                    yield pb.StreamImageResponse(preview=preview)
            case Frame(sample_index=index):
                best = index if best is None else best
                with encoding:
                    pieces = [*frame_chunks(event, job.output)]
                for frame in pieces:
                    sample = pb.Sample(sample_index=index, frame=frame)
                    yield pb.StreamImageResponse(sample=sample)
            case Done():
                done = pb.ImageDoneEvent(
                    request_id=job.request_id,
                    seed=job.generation.seed,
                    timings=encoding.timings(event),
                    sample_index=best,
                    scores=_scores(event),
                )
                yield pb.StreamImageResponse(done=done)


def _previews(job: Job, event: Preview) -> Iterator[pb.PreviewEvent]:
    frame = Frame(0, event.pixels, np.zeros((0, 0), np.int32), event.sample_index)
    for chunk in frame_chunks(frame, dataclasses.replace(job.output, include_tokens=False)):
        yield pb.PreviewEvent(
            frame=chunk,
            decoded_position_count=event.positions_done,
            sample_index=event.sample_index,
        )


def _add_images(
    response: pb.GenerateImageResponse, job: Job, frames: list[Frame], scores: dict[int, float]
) -> None:
    pictures = [frame_message(frame, job.output) for frame in frames]
    response.frame.CopyFrom(pictures[0])
    if not job.samples.listed:
        return
    for frame, picture in zip(frames, pictures, strict=True):
        index = frame.sample_index
        response.samples.add(sample_index=index, score=scores.get(index), frame=picture)


def clip_responses(job: Job, events: Iterator[Event]) -> Iterator[pb.GenerateVideoResponse]:
    """The stream that answers GenerateVideo, one message for each event.

    Holds no frames but those of the animation, if one is asked for.
    """
    shown: int | None = None if job.samples.rank_by else job.generation.sample_index
    pictures: list[Pixels] = []
    encoding = _Stopwatch()
    for event in events:
        match event:
            case Accepted():
                yield pb.GenerateVideoResponse(accepted=_accepted(job, event))
            case Progress():
                yield pb.GenerateVideoResponse(progress=_progress(event))
            case Frame(sample_index=index):
                if shown is None:
                    shown = index  # the best one is the first to come
                if job.output.animation and index == shown:
                    pictures.append(event.pixels)
                with encoding:
                    pieces = [*frame_chunks(event, job.output)]
                for frame in pieces:
                    sent = pb.FrameEvent(frame=frame, sample_index=index)
                    yield pb.GenerateVideoResponse(frame=sent)
            case Done():
                assert shown is not None, "a sample has frames"
                done = _done(job, shown, pictures, event, encoding)
                yield from map(_animation_event, _take_chunks(done))
                yield pb.GenerateVideoResponse(done=done)


def _accepted(job: Job, event: Accepted) -> pb.AcceptedEvent:
    return pb.AcceptedEvent(
        request_id=job.request_id,
        seed=job.generation.seed,
        frame_count=job.generation.frame_count,
        queue_duration=_duration(event.queue_seconds),
        sample_index=event.sample_index,
    )


def _progress(event: Progress) -> pb.ProgressEvent:
    return pb.ProgressEvent(
        decoded_position_count=event.positions_done,
        total_position_count=event.positions_total,
        decoded_frame_count=event.frames_done,
        total_frame_count=event.frames_total,
        sample_index=event.sample_index,
    )


def _done(
    job: Job, sample_index: int, pictures: list[Pixels], event: Done, encoding: _Stopwatch
) -> pb.DoneEvent:
    done = pb.DoneEvent(
        request_id=job.request_id,
        seed=job.generation.seed,
        sample_index=sample_index,
        scores=_scores(event),
    )
    output = job.output
    if output.animation:
        with encoding:
            done.animation = media.encode_animation(
                pictures, output.animation, output.frames_per_second, output.scale
            )
        done.animation_format = ANIMATION_FORMATS[output.animation]
    done.timings.CopyFrom(encoding.timings(event))
    return done


class _Stopwatch:
    """Adds up the seconds of encoding."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_exception: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def timings(self, event: Done) -> pb.Timings:
        return timings_message(dataclasses.replace(event.timings, encoding=self._seconds))


def _animation_event(chunk: pb.AnimationEvent) -> pb.GenerateVideoResponse:
    return pb.GenerateVideoResponse(animation=chunk)


def _take_chunks(done: pb.DoneEvent) -> Iterator[pb.AnimationEvent]:
    """Takes a large animation out of the event, in pieces."""
    chunks = _chunks(done.animation)
    if len(chunks) > 1:
        done.animation = b""
        for index, data in enumerate(chunks):
            yield pb.AnimationEvent(data=data, chunk_index=index, chunk_count=len(chunks))


def _chunks(data: bytes) -> list[bytes]:
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


def _scores(event: Done) -> list[pb.SampleScore]:
    return [
        pb.SampleScore(sample_index=index, score=score) for index, score in event.scores.items()
    ]


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


def frame_chunks(frame: Frame, output: OutputOptions) -> Iterator[pb.Frame]:
    """As frame_message, in pieces where it is large."""
    message = frame_message(frame, output)
    chunks = _chunks(message.data)
    if len(chunks) <= 1:
        yield message
        return
    for index, data in enumerate(chunks):
        piece = pb.Frame(
            index=message.index,
            data=data,
            format=message.format,
            height=message.height,
            width=message.width,
            chunk_index=index,
            chunk_count=len(chunks),
        )
        if index == 0 and message.HasField("token_grid"):
            piece.token_grid.CopyFrom(message.token_grid)
        yield piece


def timings_message(timings: Timings) -> pb.Timings:
    """Seconds as durations."""
    return pb.Timings(
        queue_duration=_duration(timings.queue),
        encode_duration=_duration(timings.encode),
        decode_duration=_duration(timings.decode),
        pixel_duration=_duration(timings.pixels),
        total_duration=_duration(timings.total),
        step_count=timings.steps,
        ranking_duration=_duration(timings.ranking),
        prefill_duration=_duration(timings.prefill),
        encoding_duration=_duration(timings.encoding),
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
        max_prediction_frame_count=info.max_predicted_frames,
        sketch_class_count=info.sketch_classes,
        sketch_palette=_palette(info.sketch_classes),
        rankers=info.rankers,
        max_sample_count=MAX_SAMPLES,
        sampling_defaults=[
            pb.SamplingDefault(
                task=TASK_VALUES[task],
                sampling=pb.Sampling(**dataclasses.asdict(info.sampling.get(task, Sampling()))),
            )
            for task in info.tasks
        ],
        runs_on=info.runs_on,
    )


def _palette(classes: int) -> bytes:
    return voc_palette(classes).tobytes() if classes else b""


def _token_grid(tokens: npt.NDArray[np.int32]) -> pb.TokenGrid:
    height, width = tokens.shape
    return pb.TokenGrid(tokens=tokens.reshape(-1).tolist(), height=height, width=width)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
