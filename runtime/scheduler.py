"""Which request runs when: a bounded queue, and one thread that drives the engine's slots.

Holds no tensors of its own and knows no network: tokens and pixels only pass through. Requests are
admitted first come, first served, whenever a slot is free at a step boundary; with more than one
slot this is continuous batching. A request for several samples gets its slots one at a time and
goes to the end of the queue after each, so that it never keeps others waiting for more than one of
its samples. Times are those of `time.perf_counter`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from nuwa.spec.grid import Int

from .core import (
    Accepted,
    CancelledError,
    Done,
    Frame,
    GenerationRequest,
    Pixels,
    Progress,
    QueueFullError,
    SlotStep,
)
from .engine_protocol import Engine
from .errors import DeadlineExceededError, EngineError, ShuttingDownError
from .given import restore_given
from .handle import Handle
from .submission import Submission

log = logging.getLogger("nuwa.runtime")

DEFAULT_QUEUE_SIZE = 64
CLOSE_SECONDS = 30.0  # how long close() waits for a step that is under way


@dataclass
class _Running:
    """A sample that holds a slot."""

    submission: Submission
    request: GenerationRequest
    frames_done: int = 0
    percent: int = -1

    @property
    def handle(self) -> Handle:
        return self.submission.handle


class Scheduler:
    """Runs requests on `engine`, at most `engine.slots` at a time, `queue_size` waiting.

    Use as a context manager, or start() and close(). A fault of the engine ends the requests that
    it concerns with EngineError and no others.
    """

    def __init__(self, engine: Engine, *, queue_size: int = DEFAULT_QUEUE_SIZE) -> None:
        if queue_size < 1:
            raise ValueError(f"queue_size {queue_size} is not at least 1")
        self.engine = engine
        self.queue_size = queue_size
        # Requests with samples that wait for a slot; changed under the lock. A request that has no
        # sample in a slot yet is ended by whoever takes it out of here. All others are ended by the
        # decode thread only, which empties their slots first. So each ends once.
        self._queue: deque[Submission] = deque()
        self._running: dict[int, _Running] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._aborting = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Scheduler:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot, for all of their samples or for the rest of them."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Slots that are taken, each by a sample of a request."""
        return len(self._running)

    def submit(
        self, request: GenerationRequest, *, samples: int = 1, timeout: float | None = None
    ) -> Handle:
        """Queues a request; after `timeout` seconds from now it ends with DeadlineExceededError.

        samples: how many, with sample indices from request.sample_index on; their events carry the
        index and come mixed, and Done after all of them. Raises ValueError or UnsupportedTaskError
        (the engine's check), QueueFullError, and ShuttingDownError after close().
        """
        if samples < 1:
            raise ValueError(f"samples {samples} is not at least 1")
        for index in {request.sample_index, request.sample_index + samples - 1}:
            self.engine.check(replace(request, sample_index=index))
        now = time.perf_counter()
        deadline = None if timeout is None else now + timeout
        handle = Handle(request, submitted=now, deadline=deadline, on_cancel=self._cancel_queued)
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            if len(self._queue) >= self.queue_size:
                raise QueueFullError(f"the queue is full: {self.queue_size} requests are waiting")
            self._queue.append(Submission(handle, samples))
            self._changed.notify_all()
        return handle

    def start(self) -> None:
        """Starts the decode thread."""
        assert self._thread is None, "a scheduler is started once"
        self._thread = threading.Thread(target=self._loop, name="nuwa-decode", daemon=True)
        self._thread.start()

    def close(self, grace: float = 0.0) -> None:
        """Takes no more requests, gives those at hand `grace` seconds, ends the rest.

        They end with ShuttingDownError within one step. Harmless when closed already.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            self._aborting = True
            self._sweep()
            return
        self._thread.join(grace)
        self._aborting = True
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("the engine did not return within %.0f s of close()", CLOSE_SECONDS)

    def turn(self) -> None:
        """One round: ends what is cancelled or late, admits, makes one step.

        For the decode thread, and for tests that do without it.
        """
        self._sweep()
        self._admit()
        if self._running:
            self._step()

    def _loop(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._queue or self._running or self._closing):
                        self._changed.wait()
                    if not (self._queue or self._running):
                        return
                self.turn()
        except BaseException:
            # A mistake in this file. Nobody may be left waiting for a thread that is gone.
            log.critical("the decode thread died; no more requests are taken", exc_info=True)
            with self._changed:
                self._closing = self._aborting = True
                stranded = dict.fromkeys([*self._queue, *self._submissions(self._running)])
            for submission in stranded:
                submission.handle.fail(EngineError("the server's decode thread died"))

    def _cancel_queued(self, handle: Handle) -> None:
        """Ends a cancelled handle at once if it only waits; others end at the next sweep."""
        with self._changed:
            for submission in self._queue:
                if submission.handle is handle and submission.started == 0:
                    self._queue.remove(submission)
                    break
            else:
                return
        handle.fail(CancelledError("the request was cancelled while it waited in the queue"))

    def _sweep(self) -> None:
        now = time.perf_counter()
        ended = []
        with self._changed:
            for submission in list(self._queue):
                if error := self._reason_to_stop(submission.handle, now):
                    self._queue.remove(submission)
                    ended.append((submission, error))
        for submission, error in ended:
            self._end(submission, error)
        for submission in self._submissions(self._running):
            if error := self._reason_to_stop(submission.handle, now):
                self._end(submission, error)

    def _reason_to_stop(self, handle: Handle, now: float) -> Exception | None:
        if self._aborting:
            return ShuttingDownError("the server shut down before the request was finished")
        if handle.cancelled:
            return CancelledError("the request was cancelled")
        if handle.deadline is not None and now >= handle.deadline:
            seconds = handle.deadline - handle.submitted
            return DeadlineExceededError(f"the request was not finished within {seconds:.3g} s")
        return None

    def _admit(self) -> None:
        for slot in range(self.engine.slots):
            while slot not in self._running:
                with self._changed:
                    if not self._queue:
                        return
                    submission = self._queue.popleft()
                    request = submission.start_next()
                    if not submission.all_started:
                        self._queue.append(submission)
                self._admit_one(submission, request, slot)

    def _admit_one(self, submission: Submission, request: GenerationRequest, slot: int) -> None:
        started = time.perf_counter()
        waited = started - submission.handle.submitted
        if submission.started == 1:
            submission.queue = waited
        submission.handle.emit(Accepted(waited, request.sample_index))
        self._running[slot] = _Running(submission, request)
        try:
            self.engine.admit(request, slot)
        except Exception as error:
            log.exception("the engine could not admit a request")
            self._end(submission, _engine_error("preparing the request", error))
            return
        submission.encode += time.perf_counter() - started

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            results = self.engine.step()
            elapsed = time.perf_counter() - started
            for submission in self._submissions(self._running):
                submission.decode += elapsed
                submission.steps += 1
            for result in results:
                self._report(self._running[result.slot], result)
        except Exception as error:
            log.exception("a decode step failed; the requests of %d slots end", len(self._running))
            for submission in self._submissions(self._running):
                self._end(submission, _engine_error("decoding", error))
            return
        self._paint([result for result in results if result.frames])
        for result in results:
            if result.done and result.slot in self._running:
                self._finish(result.slot)

    def _report(self, running: _Running, result: SlotStep) -> None:
        running.frames_done += len(result.frames)
        percent = 100 * result.positions_done // max(result.positions_total, 1)
        if percent != running.percent:
            running.percent = percent
            running.handle.emit(
                Progress(
                    result.positions_done,
                    result.positions_total,
                    running.frames_done,
                    running.request.frame_count,
                    running.request.sample_index,
                )
            )

    def _paint(self, results: list[SlotStep]) -> None:
        """Turns the frames finished in one step into pixels, all in one call of the engine."""
        if not results:
            return
        started = time.perf_counter()
        frames = [(result.slot, *frame) for result in results for frame in result.frames]
        try:
            pixels = self.engine.pixels(np.stack([tokens for _, _, tokens in frames]))
            painted = [
                (slot, self._frame(slot, index, tokens, picture))
                for (slot, index, tokens), picture in zip(frames, pixels, strict=True)
            ]
        except Exception as error:
            log.exception("tokens could not be turned into pixels")
            if len(results) == 1:
                submission = self._running[results[0].slot].submission
                self._end(submission, _engine_error("making pixels", error))
            else:  # one request's frames may be at fault, or the size of the batch
                for result in results:
                    if result.slot in self._running:  # its request may have ended with another slot
                        self._paint([result])
            return
        elapsed = time.perf_counter() - started
        for submission in self._submissions(result.slot for result in results):
            submission.pixels += elapsed
        for slot, frame in painted:
            self._running[slot].handle.emit(frame)

    def _frame(self, slot: int, index: int, tokens: Int, picture: Pixels) -> Frame:
        request = self._running[slot].request
        return Frame(index, restore_given(request, index, picture), tokens, request.sample_index)

    def _submissions(self, slots: Iterable[int]) -> list[Submission]:
        """Whose samples hold `slots`, each once."""
        return list(dict.fromkeys(self._running[slot].submission for slot in slots))

    def _finish(self, slot: int) -> None:
        submission = self._running[slot].submission
        self._vacate(slot)
        submission.finished += 1
        if submission.all_finished:
            submission.handle.emit(Done(submission.timings(time.perf_counter())))

    def _end(self, submission: Submission, error: Exception) -> None:
        """Ends a request: no sample of it waits or holds a slot any more."""
        with self._changed:
            if submission in self._queue:
                self._queue.remove(submission)
        for slot, running in list(self._running.items()):
            if running.submission is submission:
                self._vacate(slot)
        submission.handle.fail(error)

    def _vacate(self, slot: int) -> None:
        """Frees a slot before its owner hears of the end: who is done may count on the room."""
        del self._running[slot]
        try:
            self.engine.release(slot)
        except Exception:
            log.exception("the engine could not release slot %d", slot)


def _engine_error(doing: str, cause: Exception) -> EngineError:
    error = EngineError(f"the engine failed while {doing}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
