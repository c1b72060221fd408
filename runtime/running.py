"""A sample that holds a slot, and what its request is told while it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from .core import GenerationRequest, Progress, SlotStep
from .handle import Handle
from .submission import Submission


@dataclass
class Running:
    """request: the sample's own; previews: how many of them have been due; positions: decoded;
    decoded: the same in frames.
    """

    submission: Submission
    request: GenerationRequest
    frames_done: int = 0
    percent: int = -1
    previews: int = 0
    positions: int = 0
    decoded: float = 0.0

    @property
    def frames_left(self) -> float:
        """Frames' worth of positions that are not decoded."""
        return max(self.request.frame_count - self.decoded, 0.0)

    @property
    def handle(self) -> Handle:
        return self.submission.handle

    def advanced(self, result: SlotStep) -> float:
        """How many frames' worth of positions a step decoded; asked once for each."""
        done, self.positions = result.positions_done - self.positions, result.positions_done
        frames = max(done, 0) * self.request.frame_count / max(result.positions_total, 1)
        self.decoded += frames
        return frames

    def report(self, result: SlotStep) -> None:
        """Tells of progress, once a percent."""
        self.frames_done += len(result.frames)
        percent = 100 * result.positions_done // max(result.positions_total, 1)
        if percent != self.percent:
            self.percent = percent
            self.handle.emit(
                Progress(
                    result.positions_done,
                    result.positions_total,
                    self.frames_done,
                    self.request.frame_count,
                    self.request.sample_index,
                )
            )

    def preview_is_due(self, result: SlotStep) -> bool:
        """Whether another preview should be made now; they are spread evenly over the positions."""
        wanted = self.request.previews
        due = result.positions_done * (wanted + 1) // max(result.positions_total, 1)
        if self.previews < due <= wanted:
            self.previews = due
            return True
        return False
