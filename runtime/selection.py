"""The best of several samples: scored one by one as they finish, then the frames of the best ones.

Runs in the thread that reads a request's events, so that scoring never holds up the decode thread.
Holds the frames of unfinished samples and of those that may still be returned, and no others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from .core import Done, Event, Frame, GenerationRequest
from .errors import EngineError
from .handle import Handle
from .ranking import Ranker
from .samples import Samples


def events_of(handle: Handle, samples: Samples, rankers: Mapping[str, Ranker]) -> Iterator[Event]:
    """The events of a request for `samples`, as Handle.events gives and raises them.

    With a ranker, frames come after all samples are scored: those of the best sample first (of
    equals, the one of the lower index), and Done has all scores. EngineError if the ranker fails.
    """
    if not samples.rank_by:
        return handle.events()
    return _best_of(handle, Contest(handle.request, samples, rankers[samples.rank_by]))


def _best_of(handle: Handle, contest: Contest) -> Iterator[Event]:
    for event in handle.events():
        match event:
            case Frame():
                contest.add(event)
            case Done():
                total = time.perf_counter() - handle.submitted
                timings = replace(event.timings, total=total, ranking=contest.seconds)
                for frames in contest.best:
                    yield from frames
                yield Done(timings, dict(sorted(contest.scores.items())))
            case _:
                yield event


class Contest:
    """best: the frames of the best samples so far, the best first; seconds: spent on scoring."""

    def __init__(self, request: GenerationRequest, samples: Samples, ranker: Ranker) -> None:
        self.best: list[list[Frame]] = []
        self.scores: dict[int, float] = {}
        self.seconds = 0.0
        self._prompt = request.prompt
        self._frame_count = request.frame_count
        self._samples = samples
        self._ranker = ranker
        self._unfinished: dict[int, list[Frame]] = {}

    def add(self, frame: Frame) -> None:
        """Scores the sample if this is its last frame."""
        sample = frame.sample_index
        frames = self._unfinished.setdefault(sample, [])
        frames.append(frame)
        if len(frames) < self._frame_count:
            return
        del self._unfinished[sample]
        self.scores[sample] = self._score(frames)
        self.best.append(frames)
        self.best.sort(key=self._place)
        del self.best[self._samples.returned :]

    def _place(self, frames: list[Frame]) -> tuple[float, int]:
        sample = frames[0].sample_index
        return -self.scores[sample], sample

    def _score(self, frames: list[Frame]) -> float:
        name, started = self._samples.rank_by, time.perf_counter()
        pixels = np.stack([frame.pixels for frame in frames])
        try:
            score = float(self._ranker(self._prompt, pixels))
        except Exception as error:
            raise EngineError(f"ranker {name!r} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(score):
            raise EngineError(f"ranker {name!r} gave the score {score}")
        self.seconds += time.perf_counter() - started
        return score
