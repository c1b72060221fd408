"""Answers of nuwa.v1 as Python values: arrays, seconds, the events of core.py.

For the client and the command line; the counterpart of requests.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from nuwa.spec.sampling import Sampling
from nuwa.v1 import generation_pb2 as pb

from . import media
from .convert import TASKS, stated
from .core import Accepted, Frame, ModelInfo, Pixels, Preview, Progress, Timings

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ImageSample:
    """One sample of an image; fields as in ImageResult. score: None if it was not ranked."""

    pixels: Pixels
    data: bytes
    tokens: Tokens | None
    sample_index: int
    score: float | None


@dataclass(frozen=True)
class ImageResult:
    """pixels u8 [H, W, 3]; data: as it came (a file, or raw); tokens i32 [h, w] if asked for.

    samples: all that were returned, the best first if they were ranked; the image is the first.
    scores: of every sample that was generated, by sample_index, if they were ranked.
    """

    pixels: Pixels
    data: bytes
    tokens: Tokens | None
    seed: int
    timings: Timings
    request_id: str
    samples: tuple[ImageSample, ...]
    scores: dict[int, float]


@dataclass(frozen=True)
class ImageDone:
    """The last event of an image, or of several samples of it; fields as in ClipDone."""

    seed: int
    timings: Timings
    request_id: str
    sample_index: int
    scores: dict[int, float]


@dataclass(frozen=True)
class ClipSample:
    """One sample of a clip; fields as in ClipResult. score: None if it was not ranked."""

    frames: Pixels
    tokens: Tokens | None
    sample_index: int
    score: float | None


@dataclass(frozen=True)
class ClipResult:
    """frames u8 [F, H, W, 3]; tokens i32 [F, h, w] and animation (a file) if asked for.

    samples and scores: as in ImageResult.
    """

    frames: Pixels
    tokens: Tokens | None
    animation: bytes | None
    seed: int
    timings: Timings
    request_id: str
    samples: tuple[ClipSample, ...]
    scores: dict[int, float]


@dataclass(frozen=True)
class ClipDone:
    """The last event of a clip. animation: the whole clip as a file, if asked for.

    sample_index: the best sample, or the first if they were not ranked; the animation is of it.
    scores: of every sample by sample_index, if they were ranked.
    """

    seed: int
    timings: Timings
    animation: bytes | None
    request_id: str
    sample_index: int
    scores: dict[int, float]


ClipEvent = Accepted | Progress | Frame | ClipDone
ImageEvent = Accepted | Progress | Preview | ImageSample | ImageDone


def image_result(message: pb.GenerateImageResponse, sample_index: int = 0) -> ImageResult:
    """The answer to GenerateImage. sample_index: that of the request, for an only sample."""
    if message.samples:
        samples = tuple(_image_sample(each) for each in message.samples)
    else:
        samples = (_image_sample(pb.Sample(frame=message.frame, sample_index=sample_index)),)
    first = samples[0]
    return ImageResult(
        pixels=first.pixels,
        data=first.data,
        tokens=first.tokens,
        seed=message.seed,
        timings=_timings(message.timings),
        request_id=message.request_id,
        samples=samples,
        scores=_scores(message.scores),
    )


def _image_sample(message: pb.Sample) -> ImageSample:
    return ImageSample(
        pixels=_pixels(message.frame),
        data=message.frame.data,
        tokens=_tokens(message.frame),
        sample_index=message.sample_index,
        score=message.score if message.HasField("score") else None,
    )


def image_events(messages: Iterator[pb.StreamImageResponse]) -> Iterator[ImageEvent]:
    """The stream of StreamImage. Events of a kind that this version does not know are skipped."""
    reader = ImageReader()
    for message in messages:
        yield from reader.read(message)


class ImageReader:
    """Reads one stream of StreamImage, message by message."""

    def __init__(self) -> None:
        self._samples, self._previews = _Pieces(), _Pieces()

    def read(self, message: pb.StreamImageResponse) -> Iterator[ImageEvent]:
        """The event of a message; none until a picture that comes in pieces is whole."""
        match message.WhichOneof("event"):
            case "accepted":
                yield _accepted(message.accepted)
            case "progress":
                yield _progress(message.progress)
            case "preview":
                shown = message.preview
                for frame in self._previews.add(shown.frame):
                    yield Preview(_pixels(frame), shown.decoded_position_count, shown.sample_index)
            case "sample":
                for frame in self._samples.add(message.sample.frame):
                    message.sample.frame.CopyFrom(frame)
                    yield _image_sample(message.sample)
            case "done":
                done = message.done
                yield ImageDone(
                    seed=done.seed,
                    timings=_timings(done.timings),
                    request_id=done.request_id,
                    sample_index=done.sample_index,
                    scores=_scores(done.scores),
                )


class _Pieces:
    """Puts frames together that come in pieces, one after the other."""

    def __init__(self) -> None:
        self._first = pb.Frame()
        self._data: list[bytes] = []

    def add(self, frame: pb.Frame) -> Iterator[pb.Frame]:
        """The whole frame, once it is."""
        if frame.chunk_count <= 1:
            yield frame
            return
        if frame.chunk_index == 0:
            self._first, self._data = frame, []
        self._data.append(frame.data)
        if frame.chunk_index == frame.chunk_count - 1:
            self._first.data = b"".join(self._data)
            self._data = []
            yield self._first


def _accepted(event: pb.AcceptedEvent) -> Accepted:
    return Accepted(_seconds(event.queue_duration), event.sample_index)


def _progress(event: pb.ProgressEvent) -> Progress:
    return Progress(
        event.decoded_position_count,
        event.total_position_count,
        event.decoded_frame_count,
        event.total_frame_count,
        event.sample_index,
    )


def clip_events(messages: Iterator[pb.GenerateVideoResponse]) -> Iterator[ClipEvent]:
    """The stream of GenerateVideo. Events of a kind that this version does not know are skipped."""
    reader = ClipReader()
    for message in messages:
        yield from reader.read(message)


class ClipReader:
    """Reads one stream of GenerateVideo, message by message."""

    def __init__(self) -> None:
        self._frames = _Pieces()
        self._animation: list[bytes] = []

    def read(self, message: pb.GenerateVideoResponse) -> Iterator[ClipEvent]:
        """The event of a message; none until what comes in pieces is whole.

        Frame.tokens is an empty array where tokens were not asked for.
        """
        match message.WhichOneof("event"):
            case "accepted":
                yield _accepted(message.accepted)
            case "progress":
                yield _progress(message.progress)
            case "frame":
                for frame in self._frames.add(message.frame.frame):
                    tokens = _tokens(frame)
                    yield Frame(
                        frame.index,
                        _pixels(frame),
                        np.zeros((0, 0), np.int32) if tokens is None else tokens,
                        message.frame.sample_index,
                    )
            case "animation":
                self._animation.append(message.animation.data)
            case "done":
                done = message.done
                yield ClipDone(
                    seed=done.seed,
                    timings=_timings(done.timings),
                    animation=done.animation or b"".join(self._animation) or None,
                    request_id=done.request_id,
                    sample_index=done.sample_index,
                    scores=_scores(done.scores),
                )


def clip_result(frames: list[Frame], done: ClipDone) -> ClipResult:
    """The frames of a stream, in the order in which they came, and its last event as one value."""
    clips: dict[int, list[Frame]] = {}
    for frame in frames:
        clips.setdefault(frame.sample_index, []).append(frame)
    order = list(clips) if done.scores else sorted(clips)
    samples = tuple(_clip_sample(clips[index], done) for index in order)
    return ClipResult(
        frames=samples[0].frames,
        tokens=samples[0].tokens,
        animation=done.animation,
        seed=done.seed,
        timings=done.timings,
        request_id=done.request_id,
        samples=samples,
        scores=done.scores,
    )


def _clip_sample(frames: list[Frame], done: ClipDone) -> ClipSample:
    tokens = np.stack([frame.tokens for frame in frames])
    index = frames[0].sample_index
    return ClipSample(
        frames=np.stack([frame.pixels for frame in frames]),
        tokens=tokens if tokens.size else None,
        sample_index=index,
        score=done.scores.get(index),
    )


def model_info(message: pb.Model) -> ModelInfo:
    """What GetModel tells; tasks that this version does not know are left out."""
    return ModelInfo(
        name=message.name,
        bundle_hash=message.bundle_hash,
        tasks=tuple(TASKS[value] for value in message.tasks if value in TASKS),
        height=message.height,
        width=message.width,
        max_frames=message.max_frame_count,
        max_predicted_frames=message.max_prediction_frame_count or message.max_frame_count,
        codebook_size=message.codebook_size,
        sketch_classes=message.sketch_class_count,
        parameter_count=message.parameter_count,
        precision=message.precision,
        licence=message.license,
        backend=message.backend,
        rankers=tuple(message.rankers),
        sampling={
            TASKS[each.task]: Sampling(**stated(each.sampling))
            for each in message.sampling_defaults
            if each.task in TASKS
        },
        version=message.version or 1,
        runs_on=message.runs_on,
    )


def _pixels(frame: pb.Frame) -> Pixels:
    if frame.format == pb.IMAGE_FORMAT_RAW_RGB:
        pixels = np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.width, 3)
        return pixels.copy()  # which may be written to, as those of files may
    limits = media.Limits(max_bytes=len(frame.data), max_pixels=frame.height * frame.width)
    return media.decode_clip(frame.data, limits)[0]


def _tokens(frame: pb.Frame) -> Tokens | None:
    if not frame.HasField("token_grid"):
        return None
    grid = frame.token_grid
    return np.array(grid.tokens, np.int32).reshape(grid.height, grid.width)


def _timings(message: pb.Timings) -> Timings:
    return Timings(
        queue=_seconds(message.queue_duration),
        encode=_seconds(message.encode_duration),
        decode=_seconds(message.decode_duration),
        pixels=_seconds(message.pixel_duration),
        total=_seconds(message.total_duration),
        steps=message.step_count,
        ranking=_seconds(message.ranking_duration),
        prefill=_seconds(message.prefill_duration),
        encoding=_seconds(message.encoding_duration),
    )


def _scores(messages: Iterable[pb.SampleScore]) -> dict[int, float]:
    return {each.sample_index: each.score for each in messages}


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
