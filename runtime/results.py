"""Answers of nuwa.v1 as Python values: arrays, seconds, the events of core.py.

For the client and the command line; the counterpart of requests.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from nuwa.v1 import generation_pb2 as pb

from . import media
from .convert import TASKS
from .core import Accepted, Frame, ModelInfo, Pixels, Progress, Timings

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ImageResult:
    """pixels u8 [H, W, 3]; data: as it came (a file, or raw); tokens i32 [h, w] if asked for."""

    pixels: Pixels
    data: bytes
    tokens: Tokens | None
    seed: int
    timings: Timings
    request_id: str


@dataclass(frozen=True)
class ClipResult:
    """frames u8 [F, H, W, 3]; tokens i32 [F, h, w] and animation (a file) if asked for."""

    frames: Pixels
    tokens: Tokens | None
    animation: bytes | None
    seed: int
    timings: Timings
    request_id: str


@dataclass(frozen=True)
class ClipDone:
    """The last event of a clip. animation: the whole clip as a file, if asked for."""

    seed: int
    timings: Timings
    animation: bytes | None
    request_id: str


ClipEvent = Accepted | Progress | Frame | ClipDone


def image_result(message: pb.GenerateImageResponse) -> ImageResult:
    """The answer to GenerateImage."""
    return ImageResult(
        pixels=_pixels(message.frame),
        data=message.frame.data,
        tokens=_tokens(message.frame),
        seed=message.seed,
        timings=_timings(message.timings),
        request_id=message.request_id,
    )


def clip_events(messages: Iterator[pb.GenerateVideoResponse]) -> Iterator[ClipEvent]:
    """The stream of GenerateVideo. Events of a kind that this version does not know are skipped.

    Frame.tokens is an empty array where tokens were not asked for.
    """
    for message in messages:
        match message.WhichOneof("event"):
            case "accepted":
                yield Accepted(_seconds(message.accepted.queue_duration))
            case "progress":
                event = message.progress
                yield Progress(
                    event.decoded_position_count,
                    event.total_position_count,
                    event.decoded_frame_count,
                    event.total_frame_count,
                )
            case "frame":
                frame = message.frame.frame
                tokens = _tokens(frame)
                empty = np.zeros((0, 0), np.int32)
                yield Frame(frame.index, _pixels(frame), empty if tokens is None else tokens)
            case "done":
                done = message.done
                yield ClipDone(
                    done.seed, _timings(done.timings), done.animation or None, done.request_id
                )


def clip_result(frames: list[Frame], done: ClipDone) -> ClipResult:
    """The frames of a stream and its last event as one value."""
    tokens = np.stack([frame.tokens for frame in frames])
    return ClipResult(
        frames=np.stack([frame.pixels for frame in frames]),
        tokens=tokens if tokens.size else None,
        animation=done.animation,
        seed=done.seed,
        timings=done.timings,
        request_id=done.request_id,
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
        codebook_size=message.codebook_size,
        parameter_count=message.parameter_count,
        precision=message.precision,
        licence=message.license,
        backend=message.backend,
    )


def _pixels(frame: pb.Frame) -> Pixels:
    if frame.format == pb.IMAGE_FORMAT_RAW_RGB:
        return np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.width, 3)
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
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
