"""Which request runs when: a bounded queue, and one thread that drives the engine's slots.

Holds no tensors of its own and knows no network: tokens and pixels only pass through. Requests are
admitted first come, first served, whenever a slot is free at a step boundary; with more than one
slot this is continuous batching. Times are those of `time.perf_counter`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from .core import (
    Accepted,
    CancelledError,
    Done,
    Frame,
    GenerationRequest,
    Progress,
    QueueFullError,
    SlotStep,
    Timings,
)
from .engine_protocol import Engine
from .errors import DeadlineExceededError, EngineError, ShuttingDownError
from .given import restore_given
from .handle import Handle

log = logging.getLogger("nuwa.runtime")

DEFAULT_QUEUE_SIZE = 64
CLOSE_SECONDS = 30.0  # how long close() waits for a step that is under way


@dataclass
class _Running:
    """A request that holds a slot, and where its time went so far."""

    handle: Handle
    queue: float
    encode: float = 0.0
    decode: float = 0.0
    pixels: float = 0.0
    steps: int = 0
    frames_done: int = 0
    percent: int = -1

    def timings(self, now: float) -> Timings:
        total = now - self.handle.submitted
        return Timings(self.queue, self.encode, self.decode, self.pixels, total, self.steps)


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
        # A handle belongs to the queue or to a slot. Whoever takes it out of there (the queue is
        # changed under the lock, the slots by the decode thread only) ends it, so it ends once.
        self._queue: deque[Handle] = deque()
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
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    def submit(self, request: GenerationRequest, *, timeout: float | None = None) -> Handle:
        """Queues a request; after `timeout` seconds from now it ends with DeadlineExceededError.

        Raises ValueError or UnsupportedTaskError (the engine's check), QueueFullError, and
        ShuttingDownError after close().
        """
        self.engine.check(request)
        now = time.perf_counter()
        deadline = None if timeout is None else now + timeout
        handle = Handle(request, submitted=now, deadline=deadline, on_cancel=self._cancel_queued)
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            if len(self._queue) >= self.queue_size:
                raise QueueFullError(f"the queue is full: {self.queue_size} requests are waiting")
            self._queue.append(handle)
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
            for handle in [*self._queue, *(running.handle for running in self._running.values())]:
                handle.fail(EngineError("the server's decode thread died"))

    def _cancel_queued(self, handle: Handle) -> None:
        """Ends a cancelled handle at once if it waits; a running one ends at the next sweep."""
        with self._changed:
            try:
                self._queue.remove(handle)
            except ValueError:
                return
        handle.fail(CancelledError("the request was cancelled while it waited in the queue"))

    def _sweep(self) -> None:
        now = time.perf_counter()
        ended = []
        with self._changed:
            for handle in list(self._queue):
                if error := self._reason_to_stop(handle, now):
                    self._queue.remove(handle)
                    ended.append((handle, error))
        for handle, error in ended:
            handle.fail(error)
        for slot, running in list(self._running.items()):
            if error := self._reason_to_stop(running.handle, now):
                self._end(slot, error)

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
                    handle = self._queue.popleft()
                self._admit_one(handle, slot)

    def _admit_one(self, handle: Handle, slot: int) -> None:
        started = time.perf_counter()
        running = _Running(handle, queue=started - handle.submitted)
        handle.emit(Accepted(running.queue))
        self._running[slot] = running
        try:
            self.engine.admit(handle.request, slot)
        except Exception as error:
            log.exception("the engine could not admit a request")
            self._end(slot, _engine_error("preparing the request", error))
            return
        running.encode = time.perf_counter() - started

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            results = self.engine.step()
            elapsed = time.perf_counter() - started
            for running in self._running.values():
                running.decode += elapsed
                running.steps += 1
            for result in results:
                self._report(self._running[result.slot], result)
        except Exception as error:
            log.exception("a decode step failed; its %d requests end", len(self._running))
            for slot in list(self._running):
                self._end(slot, _engine_error("decoding", error))
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
                    running.handle.request.frame_count,
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
            painted = list(zip(frames, pixels, strict=True))
        except Exception as error:
            log.exception("tokens could not be turned into pixels")
            if len(results) == 1:
                self._end(results[0].slot, _engine_error("making pixels", error))
            else:  # one request's frames may be at fault, or the size of the batch
                for result in results:
                    self._paint([result])
            return
        elapsed = time.perf_counter() - started
        for result in results:
            self._running[result.slot].pixels += elapsed
        for (slot, index, tokens), picture in painted:
            handle = self._running[slot].handle
            handle.emit(Frame(index, restore_given(handle.request, index, picture), tokens))

    def _finish(self, slot: int) -> None:
        running = self._running[slot]
        self._vacate(slot)
        running.handle.emit(Done(running.timings(time.perf_counter())))

    def _end(self, slot: int, error: Exception) -> None:
        handle = self._running[slot].handle
        self._vacate(slot)
        handle.fail(error)

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
