"""Turns finished frames into pixels, in a thread of its own, so that decoding never waits for it.

Frames that wait are decoded together, of whatever requests they are. Knows no slots and no queue of
requests: what it may not do itself, it tells the scheduler.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import Int

from .core import Done, Frame, GenerationRequest, Pixels, Preview
from .engine_protocol import Engine
from .given import given_frame, restore_given
from .pulse import Pulse
from .submission import Submission

log = logging.getLogger("nuwa.runtime")

GREY = 128  # where an unfinished image has nothing yet
MOST_FRAMES = 16  # of a call: its memory, and how long the first of them waits for the last


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame to paint; request: the one of its sample.

    decoded: bool [h, w], of an unfinished image the tokens that are there; else None.
    """

    submission: Submission
    request: GenerationRequest
    index: int
    tokens: Int
    decoded: npt.NDArray[np.bool_] | None = None


class Painter:
    """on_error(submission, error): called when a request's pixels cannot be made.

    guarded: runs the thread's loop, and sees to its end if that ever raises. start() and close(),
    or `paint` in the caller's thread.
    """

    def __init__(
        self,
        engine: Engine,
        on_error: Callable[[Submission, Exception], None],
        guarded: Callable[[Callable[[], None]], None],
        pulse: Pulse,
    ) -> None:
        self._engine, self._on_error, self._guarded = engine, on_error, guarded
        self._pulse = pulse
        # Pictures, and requests that are done once all pictures before them are.
        self._jobs: deque[Picture | Submission] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(
            target=self._guarded, args=(self._loop,), name="nuwa-pixels", daemon=True
        )
        self._thread.start()

    def put(self, job: Picture | Submission) -> None:
        """Queues a picture, or the end of a request."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Paints what is left, then ends the thread; whether that took no longer than `timeout`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def paint(self) -> None:
        """Does all that waits."""
        while jobs := self._take():
            pictures = [job for job in jobs if isinstance(job, Picture)]
            self._paint(pictures)
            for job in jobs:
                if isinstance(job, Submission) and not job.handle.ended:
                    job.handle.emit(Done(job.timings(time.perf_counter())))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._closing):
                    self._changed.wait()
                if not self._jobs:
                    return
            self.paint()

    def _take(self) -> list[Picture | Submission]:
        """The jobs that are next, at most MOST_FRAMES pictures of requests that go on."""
        taken: list[Picture | Submission] = []
        pictures = 0
        with self._changed:
            while self._jobs and pictures < MOST_FRAMES:
                job = self._jobs.popleft()
                if isinstance(job, Picture):
                    if job.submission.handle.ended:
                        continue
                    pictures += 1
                taken.append(job)
        return taken

    def _paint(self, pictures: list[Picture]) -> None:
        if not pictures:
            return
        started = time.perf_counter()
        try:
            events = self._events(pictures)
        except Exception as error:
            if len(pictures) == 1:
                log.exception("tokens could not be turned into pixels")
                self._on_error(pictures[0].submission, error)
            else:  # one frame may be at fault, or the size of the batch
                for each in pictures:
                    if not each.submission.handle.ended:
                        self._paint([each])
            return
        elapsed = time.perf_counter() - started
        for submission in dict.fromkeys(each.submission for each in pictures):
            submission.pixels += elapsed
        for each, event in zip(pictures, events, strict=True):
            each.submission.handle.emit(event)

    def _events(self, pictures: list[Picture]) -> list[Frame | Preview]:
        """What their requests are told; frames that are given need not be decoded for that."""
        pixels: dict[Picture, Pixels] = {}
        for each in pictures:
            if (given := given_frame(each.request, each.index)) is not None:
                pixels[each] = given
        if made := [each for each in pictures if each not in pixels]:
            tokens = np.stack([each.tokens for each in made])
            with self._pulse.at_work():
                pixels.update(zip(made, self._engine.pixels(tokens), strict=True))
        return [_event(each, pixels[each]) for each in pictures]


def _event(picture: Picture, pixels: Pixels) -> Frame | Preview:
    request, decoded = picture.request, picture.decoded
    pixels = restore_given(request, picture.index, pixels)
    if decoded is None:
        return Frame(picture.index, pixels, picture.tokens, request.sample_index)
    patch = np.ones((pixels.shape[0] // len(decoded), pixels.shape[1] // decoded.shape[1]), bool)
    shown = np.kron(decoded, patch)
    if request.mask is not None:
        shown |= ~request.mask  # what is given is there from the start
    grey = np.where(shown[..., None], pixels, np.uint8(GREY))
    return Preview(grey, int(decoded.sum()), request.sample_index)
