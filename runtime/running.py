"""A sample that holds a slot, and what its request is told while it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from .core import GenerationRequest, Progress, SlotStep
from .handle import Handle
from .submission import Submission, Work


@dataclass
class Running:
    """request: the sample's own; previews: how many of them have been due; decoded: positions,
    in frames; drawn: the share of its work that is done.
    """

    submission: Submission
    request: GenerationRequest
    frames_done: int = 0
    percent: int = -1
    previews: int = 0
    decoded: float = 0.0
    drawn: float = 0.0

    @property
    def left(self) -> Work:
        """What is not decoded."""
        work, part = self.submission.work, 1.0 - self.drawn
        return Work(work.rows * part, work.frames * part, part)

    @property
    def handle(self) -> Handle:
        return self.submission.handle

    def advanced(self, result: SlotStep) -> Work:
        """What a step did; asked once for each. Given tokens among those that are drawn count."""
        total, given = self.request.frame_count, self.submission.given_frames
        before, drawn = self.decoded, self.drawn
        self.decoded = max(before, result.positions_done * total / max(result.positions_total, 1))
        self.drawn = max(drawn, (self.decoded - given) / max(total - given, 1))
        part = self.drawn - drawn
        frames = part * self.submission.work.frames if result.prefill else self.decoded - before
        return Work(frames * self.submission.lanes, frames, part)

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
        if not wanted:
            return False
        due = result.positions_done * (wanted + 1) // max(result.positions_total, 1)
        if self.previews < due <= wanted:
            self.previews = due
            return True
        return False
