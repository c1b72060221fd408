"""The nouns that the engine, the scheduler and the service share: requests, events, errors.

Knows no tensors' meaning beyond their shapes, no network and no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

Pixels = npt.NDArray[np.uint8]  # [height, width, 3] or [frames, height, width, 3], sRGB
Mask = npt.NDArray[np.bool_]  # [height, width]; True = generate here

MAX_SEED = 2**63 - 1
MAX_PREVIEWS = 16


class UnsupportedTaskError(Exception):
    """The loaded bundle cannot do this task; the message and `tasks` say which it can."""

    def __init__(self, message: str, tasks: tuple[Task, ...] = ()) -> None:
        super().__init__(message)
        self.tasks = tasks


class CancelledError(Exception):
    """The request was cancelled, or its deadline passed, before it was finished."""


class QueueFullError(Exception):
    """There is no room for the request; retry_seconds: when there may be."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(frozen=True)
class GenerationRequest:
    """One image or clip to generate.

    prompt: any Unicode text; "" only where the task needs no text.
    frame_count: frames of the result (1 for the image tasks).
    seed: 0 .. 2**63 - 1; the same seed gives the same tokens under any schedule.
    sample_index: which of several samples of one seed this is.
    frames: uint8 [F, H, W, 3], the given picture or clip of completion, prediction, manipulation.
    mask: bool [H, W], True where those tasks generate.
    sketch: class ids uint8 [F, H, W] for S2I and S2V.
    schedule: "wave", or "raster" for one-by-one decoding (same tokens, for comparison).
    previews: how often an unfinished image is shown, 0 .. MAX_PREVIEWS; only for images.
    """

    task: Task
    prompt: str = ""
    frame_count: int = 1
    seed: int = 0
    sample_index: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    frames: Pixels | None = None
    mask: Mask | None = None
    sketch: npt.NDArray[np.uint8] | None = None
    schedule: str = "wave"
    previews: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed {self.seed} is not in [0, {MAX_SEED}]")
        if self.frame_count < 1:
            raise ValueError(f"frame_count {self.frame_count} is not at least 1")
        if self.schedule not in ("wave", "raster"):
            raise ValueError(f"schedule {self.schedule!r} is not one of 'wave', 'raster'")
        if not 0 <= self.previews <= MAX_PREVIEWS:
            raise ValueError(f"preview_count {self.previews} is not in [0, {MAX_PREVIEWS}]")
        if self.previews and self.task.is_video:
            raise ValueError(f"task {self.task} has no previews; frames come as they are finished")


@dataclass(frozen=True)
class Timings:
    """Seconds spent on one request, by phase, and how many steps decoding took.

    Of several samples all together; queue: until the first of them got a slot; prefill: of decode,
    steps that only caught up with given tokens; encoding: of pictures into files, by a server.
    """

    queue: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    pixels: float = 0.0
    total: float = 0.0
    steps: int = 0
    ranking: float = 0.0
    prefill: float = 0.0
    encoding: float = 0.0


@dataclass(frozen=True)
class Accepted:
    """A sample left the queue and holds a slot; queue_seconds is how long it waited."""

    queue_seconds: float
    sample_index: int = 0


@dataclass(frozen=True)
class Progress:
    """One sample so far. positions: tokens decoded; frames: frames whose tokens are complete."""

    positions_done: int
    positions_total: int
    frames_done: int
    frames_total: int
    sample_index: int = 0


@dataclass(frozen=True)
class Frame:
    """One finished frame: pixels uint8 [H, W, 3], tokens int32 [h, w]."""

    index: int
    pixels: Pixels
    tokens: npt.NDArray[np.int32]
    sample_index: int = 0


@dataclass(frozen=True)
class Preview:
    """An image of which so many positions are decoded: pixels uint8 [H, W, 3], the rest is grey."""

    pixels: Pixels
    positions_done: int
    sample_index: int = 0


@dataclass(frozen=True)
class Done:
    """Always the last event of a request that was not cancelled and did not fail.

    scores: of every sample by sample_index, where samples were ranked; higher is better.
    """

    timings: Timings
    scores: dict[int, float] = field(default_factory=dict)


Event = Accepted | Progress | Preview | Frame | Done


class SlotStep(NamedTuple):
    """What one decode step did for one slot.

    frames: (index, tokens int32 [h, w]) of each frame that this step completed, in index order.
    error: why the slot can go no further; everything else is then as before the wave that failed.
    prefill: whether it only caught up with what is given. waves: how many of them it was.
    """

    slot: int
    positions_done: int
    positions_total: int
    frames: tuple[tuple[int, npt.NDArray[np.int32]], ...]
    done: bool
    error: Exception | None = None
    prefill: bool = False
    waves: int = 1


class Until:
    """How far several waves in one go go: to the one during which they come to take `seconds`, or
    anyone calls `end`; on a GPU, to those that are launched by then, which are no more than took as
    long of late. One thread clears it, and takes the steps.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ended = np.zeros(1, np.int32)

    @property
    def ended(self) -> bool:
        return bool(self._ended[0])

    @property
    def address(self) -> int:
        """Where `ended` is, as an int32, for those who ask while nothing of Python runs."""
        return self._ended.ctypes.data

    def end(self) -> None:
        """The step that is under way, or the next one, is to end soon. For any thread."""
        self._ended[0] = 1

    def clear(self) -> None:
        """Before all is looked at that may have been the reason to end."""
        self._ended[0] = 0


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded bundle is and can do (GetModel).

    max_predicted_frames: longest clip of V2V, as max_frames is of the other tasks. sketch_classes:
    0 where the bundle takes no sketches. rankers: names of what can score samples.
    sampling: of requests that do not say, Sampling() for tasks not named. version: of the model on
    its server. runs_on: libraries, their versions and what else decides how fast `backend` is.
    """

    name: str
    bundle_hash: str
    tasks: tuple[Task, ...]
    height: int
    width: int
    max_frames: int
    max_predicted_frames: int
    codebook_size: int
    sketch_classes: int
    parameter_count: int
    precision: str
    licence: str
    backend: str
    rankers: tuple[str, ...]
    sampling: Mapping[Task, Sampling]
    version: int = 1
    runs_on: str = ""
