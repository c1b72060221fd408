"""What a benchmark asks for: requests of one task, numbered, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa.spec.tasks import Task

from ..core import ModelInfo

GIVEN_FRAMES = 2  # of V2V
PROMPTS = tuple(
    f"a {colour} {digit} on a {background} background"
    for colour, digit, background in (
        ("red", 3, "black"),
        ("blue", 7, "white"),
        ("green", 0, "black"),
        ("yellow", 5, "black"),
        ("red", 8, "white"),
        ("blue", 1, "black"),
    )
)
MOTIONS = ("left", "right", "up", "down")

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Query:
    """Arguments of a client's generate_image or stream_video."""

    task: Task
    prompt: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """frames: of a result, None for as many as the model makes at once; prompts: taken in turn,
    none for captions of moving digits; sampling: what differs from the model's defaults.
    """

    task: Task
    frames: int | None = None
    samples: int = 1
    rank_by: str | None = None
    schedule: str = "wave"
    prompts: Sequence[str] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    output_format: str = "png"
    seed: int = 0

    def query(self, number: int, info: ModelInfo, model: str = "") -> Query:
        """The request of this number, for a model like this; model: its name in the request."""
        options: dict[str, Any] = {
            "seed": self.seed + number,
            "schedule": self.schedule,
            "output_format": self.output_format,
            **self.sampling,
        }
        if model:
            options["model"] = model
        if self.samples > 1:
            options |= {"samples": self.samples, "rank_by": self.rank_by}
        count = self.frame_count(info)
        if self.task.is_video:
            options["frame_count"] = count
        if self.task.needs_frames:
            drawn = frames_sent(count) if self.task is Task.V2V else count
            given = moving_square(drawn, info.height, number)
            options["video" if self.task.is_video else "image"] = (
                given if self.task.is_video else given[0]
            )
        if self.task.needs_mask:
            mask = np.zeros((info.height, info.width), bool)
            mask[:, : info.width // 2] = True
            options["mask"] = mask
        if self.task.needs_sketch:
            classes = (moving_square(count, info.height, number)[..., 0] > 0).astype(np.uint8)
            options["sketch"] = classes if self.task.is_video else classes[0]
        return Query(self.task, self.prompt(number), options)

    def prompt(self, number: int) -> str:
        """One of the workload's own, for any task; without them a caption where one is needed."""
        if self.prompts:
            return self.prompts[number % len(self.prompts)]
        if not self.task.needs_text:
            return ""
        caption = PROMPTS[number % len(PROMPTS)]
        motion = f" moving {MOTIONS[number % len(MOTIONS)]}" if self.task.is_video else ""
        return f"{caption}{motion} ."

    def frame_count(self, info: ModelInfo) -> int:
        if not self.task.is_video:
            return 1
        return info.max_frames if self.frames is None else self.frames


def frames_sent(count: int) -> int:
    """Of a V2V clip of so many frames those that the client sends."""
    return min(GIVEN_FRAMES, count - 1)


def moving_square(frames: int, side: int, number: int) -> U8:
    """u8 [F, S, S, 3]: a bright square on black, at a place that follows from `number`."""
    picture = np.zeros((frames, side, side, 3), np.uint8)
    size, room = side // 3, side - side // 3
    row, column = (7 * number) % room, (11 * number) % room
    for frame in range(frames):
        left = (column + frame) % room
        picture[frame, row : row + size, left : left + size] = (230, 60, 40)
    return picture
