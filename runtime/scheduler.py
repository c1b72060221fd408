"""Which request runs when: a bounded queue, and the threads that drive the engine.

Holds no tensors of its own and knows no network: tokens and pixels only pass through. One thread
prepares requests ahead of time, one decodes, one makes pixels (painter.py), so that none of the
three waits for another's work. Requests are admitted whenever a slot is free after a wave, first
come, first served, but fairly among clients (waiting.py); with more than one slot this is
continuous batching. A request for several samples gets its slots one at a time and queues anew
after each, so that it never keeps others waiting for more than one of its samples. Times are those
of `time.perf_counter`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from .admission import Admission
from .core import (
    Accepted,
    CancelledError,
    GenerationRequest,
    SlotStep,
    Until,
)
from .engine_protocol import Engine
from .errors import (
    DeadlineExceededError,
    DeviceLostError,
    EngineError,
    ShuttingDownError,
)
from .handle import TOLERANCE, Handle
from .painter import Painter, Picture
from .pulse import Pulse
from .running import Running
from .submission import Submission
from .waiting import Waiting

log = logging.getLogger("nuwa.runtime")

DEFAULT_QUEUE_SIZE = 64
CLOSE_SECONDS = 30.0  # how long close() waits for a step that is under way
SWEEP_SECONDS = 0.05  # how often deadlines are looked at while nothing is decoded
STEP_SECONDS = 0.005  # of a step of several waves, after which progress is told
SHUT_DOWN = "the server shut down before the request was finished"


class Scheduler:
    """Runs requests on `engine`, at most `engine.slots` at a time, `queue_size` waiting.

    Use as a context manager, or start() and close(). A fault of the engine ends the requests that
    it concerns with EngineError and no others; DeviceLostError ends all, with ShuttingDownError.
    on_death: called, by the thread that ends, when nothing can be generated any more; on_step: with
    the seconds of each wave, of those of one step on average; on_cancelled: with those from the
    cancellation of a request that held a slot until it holds none; on_thread: by each of its
    threads when it begins.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue_size: int = DEFAULT_QUEUE_SIZE,
        on_death: Callable[[], None] | None = None,
        on_step: Callable[[float], None] = lambda seconds: None,
        on_cancelled: Callable[[float], None] = lambda seconds: None,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        if queue_size < 1:
            raise ValueError(f"queue_size {queue_size} is not at least 1")
        self.engine = engine
        self.queue_size = queue_size
        # All requests from submit() on until they have ended and hold nothing, wherever they are:
        # should a thread die, these are told. A handle ends once, whoever is the first to end it.
        # Slots are emptied by the decode thread alone, before the handle ends or, where another
        # thread has ended it, at the next sweep. Changed under the lock, as the next two are.
        self._live: dict[Handle, Submission] = {}
        self._queue = Waiting()  # those with samples that wait for a slot
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()
        self._until = Until(STEP_SECONDS)
        self._soonest: float | None = None  # of the deadlines, at the last sweep
        self._on_death, self._on_step, self._on_cancelled = on_death, on_step, on_cancelled
        self._on_thread = on_thread
        self._death: Exception | None = None  # why nothing can be generated any more
        self._closing = False
        self._aborting = False
        self._threads: list[threading.Thread] = []
        self._admission = Admission(engine.slots, queue_size)
        self.pulse = Pulse()
        self._painter = Painter(engine, self._not_painted, self._guarded, self.pulse)

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
        self,
        request: GenerationRequest,
        *,
        samples: int = 1,
        timeout: float | None = None,
        client: str = "",
        most_unread: int | None = None,
    ) -> Handle:
        """Queues a request; after `timeout` seconds from now it ends with DeadlineExceededError.

        samples: how many, with sample indices from request.sample_index on; their events carry the
        index and come mixed, and Done after all of them. client: who asks; slots are shared fairly
        among clients, and one that has a name cannot fill the queue alone. most_unread: as Handle.
        Raises ValueError or UnsupportedTaskError (the engine's check), QueueFullError,
        DeadlineTooShortError, and ShuttingDownError after close().
        """
        if samples < 1:
            raise ValueError(f"samples {samples} is not at least 1")
        for index in {request.sample_index, request.sample_index + samples - 1}:
            self.engine.check(replace(request, sample_index=index))
        now = time.perf_counter()
        deadline = None if timeout is None else now + timeout
        handle = Handle(
            request,
            submitted=now,
            deadline=deadline,
            on_cancel=self._cancel_queued,
            on_room=self._notify,
            most_unread=most_unread,
        )
        info = self.engine.info
        frame_bytes = 3 * info.height * info.width
        submission = Submission(
            handle, samples, client, sample_bytes=request.frame_count * frame_bytes
        )
        with self._changed:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            self._admission.check_room(self._queue, client)
            if timeout is not None:
                running = self._running.values()
                self._admission.check_time(self._queue, running, submission, timeout)
            self.pulse.has_work()
            self._live[handle] = submission
            self._queue.append(submission)
            self._tell()
        return handle

    def check_room(self, client: str, *, certain: bool = True) -> None:
        """QueueFullError if a request of this client would find no room now: cheap to ask.

        certain: it is known to be a request to this scheduler.
        """
        with self._changed:
            self._admission.check_room(self._queue, client, certain=certain)

    def start(self) -> None:
        """Starts the threads."""
        assert not self._threads, "a scheduler is started once"
        loops = {"nuwa-decode": self._decode_loop, "nuwa-prepare": self._prepare_loop}
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=name, daemon=True)
            for name, loop in loops.items()
        ]
        self._painter.start()
        for thread in self._threads:
            thread.start()

    def close(self, grace: float = 0.0) -> None:
        """Takes no more requests, gives those at hand `grace` seconds, ends the rest.

        They end with ShuttingDownError within one step. Harmless when closed already.
        """
        with self._changed:
            self._closing = True
            self._tell()
        if not self._threads:
            self._aborting = True
            self._sweep()
            return
        self._threads[0].join(grace)
        self._aborting = True
        with self._changed:
            self._tell()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
            if thread.is_alive():
                log.error("the engine did not return within %.0f s of close()", CLOSE_SECONDS)
        if not self._painter.close(CLOSE_SECONDS):
            log.error("the engine made no pixels within %.0f s of close()", CLOSE_SECONDS)
        self._fail_all(ShuttingDownError(SHUT_DOWN))

    def turn(self) -> None:
        """One round of all there is to do, in the caller's thread; for tests, without start()."""
        self._sweep()
        while self._prepare():
            pass
        self._decode()
        self._painter.paint()
        self._sweep()

    def _round(self) -> None:
        """What the decode thread does over and over."""
        self._sweep()
        self._decode()

    def _decode(self) -> None:
        """Admits and makes one step."""
        self._admit()
        if self._running:
            self._step()

    def _decode_loop(self) -> None:
        while True:
            with self._changed:
                if not (self._running or self._can_admit() or self._aborting):
                    if self._closing and not self._queue:
                        return
                    if not self._live:
                        self.pulse.rests()
                    self._changed.wait(SWEEP_SECONDS if self._live else None)
            self.pulse.comes_round()
            self._round()
            if self._aborting and not (self._running or self._queue):
                return

    def _prepare_loop(self) -> None:
        while True:
            with self._changed:
                while not (self._aborting or self._can_prepare()):
                    if self._closing and not self._queue:
                        return
                    self._changed.wait()
                if self._aborting:
                    return
            self._prepare()

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            self._on_thread()
            loop()
        except BaseException as error:
            # The device is lost, or a mistake in this file. Nobody may be left waiting for a thread
            # that is gone.
            name = threading.current_thread().name
            log.critical("the thread %s died; no more requests are taken", name, exc_info=True)
            failure: Exception = EngineError(f"the server's thread {name} died")
            if isinstance(error, DeviceLostError):
                failure = ShuttingDownError(f"the server has to start again: {error}")
            with self._changed:
                self._closing = self._aborting = True
                self._death = self._death or failure
                self._tell()
            self._fail_all(failure)
            if self._on_death is not None:
                self._on_death()

    def _fail_all(self, error: Exception) -> None:
        """When nobody may be left to empty slots: tells whoever still waits."""
        with self._changed:
            left = list(self._live)
        for handle in left:
            handle.fail(error)

    def _notify(self) -> None:
        with self._changed:
            self._tell()

    def _tell(self) -> None:
        """Under the lock: there is something to look at, before the next wave too."""
        self._until.end()
        self._changed.notify_all()

    def _can_admit(self) -> bool:
        """Under the lock: whether a sample can have a slot."""
        return len(self._running) < self.engine.slots and self._queue.ready() is not None

    def _can_prepare(self) -> bool:
        """Under the lock: whether there is a request to prepare, and room for it."""
        if self._queue.unprepared() is None:
            return False
        return self.engine.room > 0 or self._queue.idle() is not None

    def _prepare(self) -> bool:
        """Has the engine encode the next request; False if there is none, or no room."""
        with self._changed:
            submission = self._queue.unprepared()
            if submission is None:
                return False
            if not self.engine.room:
                idle = self._queue.idle()
                if idle is None:
                    return False
                idle.discard()  # so that who has had nothing yet need not wait for all its samples
            self._queue.preparing = submission
        started = time.perf_counter()
        prepared, failure = None, None
        try:
            with self.pulse.at_work():
                prepared = self.engine.prepare(submission.handle.request)
        except Exception as error:
            log.exception("the engine could not prepare a request")
            failure = _engine_error("preparing the request", error)
        with self._changed:
            self._queue.preparing = None
            submission.prepared = prepared
            submission.encode += time.perf_counter() - started
            if submission not in self._queue:  # it was cancelled meanwhile
                submission.discard()
            elif failure is not None:
                self._queue.remove(submission)
            self._tell()
        if failure is not None:
            submission.handle.fail(failure)
        return True

    def _cancel_queued(self, handle: Handle) -> None:
        """Ends a cancelled handle at once if it holds no slot; others end at the next sweep."""
        with self._changed:
            submission = self._live.get(handle)
            if submission is None:
                return
            self._tell()
            if submission.started == 0:
                self._queue.remove(submission)
                submission.discard()
            elif not submission.all_finished:
                return
        reason = self._reason_to_stop(submission, time.perf_counter())
        assert reason is not None, "a handle is cancelled before its scheduler hears of it"
        handle.fail(reason)

    def _sweep(self) -> None:
        """Ends what has a reason to stop, and empties the slots of what others have ended."""
        self._until.clear()
        now = time.perf_counter()
        with self._changed:
            live = list(self._live.values())
        deadlines = [each.handle.deadline for each in live if each.handle.deadline is not None]
        self._soonest = min(deadlines, default=None)
        for submission in live:
            handle, error = submission.handle, self._reason_to_stop(submission, now)
            if error is None and not handle.ended:
                continue
            held = submission.running > 0
            self._end(submission, error)
            if held and handle.cancelled_at is not None:
                self._on_cancelled(time.perf_counter() - handle.cancelled_at)

    def _reason_to_stop(self, submission: Submission, now: float) -> Exception | None:
        if self._aborting:
            return self._death or ShuttingDownError(SHUT_DOWN)
        handle = submission.handle
        tolerance = TOLERANCE if handle.cancelled else 0.0
        if handle.deadline is not None and now >= handle.deadline - tolerance:
            seconds = handle.deadline - handle.submitted
            return DeadlineExceededError(f"the request was not finished within {seconds:.3g} s")
        if handle.cancelled:
            where = "" if submission.started else " while it waited in the queue"
            return CancelledError(f"the request was cancelled{where}")
        return None

    def _admit(self) -> None:
        if not self._queue:  # as mostly, while a few requests are decoded
            return
        for slot in range(self.engine.slots):
            while slot not in self._running:
                with self._changed:
                    submission = self._queue.ready()
                    if submission is None:
                        return
                    self._queue.take(submission)
                    request = submission.start_next()
                    if not submission.all_started:
                        self._queue.append(submission)
                    self._running[slot] = Running(submission, request)
                self._admit_one(submission, request, slot)

    def _admit_one(self, submission: Submission, request: GenerationRequest, slot: int) -> None:
        waited = time.perf_counter() - submission.handle.submitted - submission.encode
        if submission.started == 1:
            submission.queue = waited
        submission.handle.emit(Accepted(waited, request.sample_index))
        assert submission.prepared is not None, "only what is prepared is admitted"
        try:
            with self.pulse.at_work():
                self.engine.admit(submission.prepared, slot, request.sample_index)
        except Exception as error:
            log.exception("the engine could not admit a request")
            self._end(submission, _engine_error("preparing the request", error))

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            with self.pulse.at_work():
                results = self.engine.step(self._far())
            elapsed = time.perf_counter() - started
            taken = [(self._running[result.slot], result) for result in results]
            waves = max((result.waves for result in results), default=1)
            for submission in {each.submission for each in self._running.values()}:
                submission.decode += elapsed
                submission.steps += waves
            if prefilled := [result.slot for result in results if result.prefill]:
                for submission in self._submissions(prefilled):
                    submission.prefill += elapsed
        except Exception as error:
            log.exception("a decode step failed; the requests of %d slots end", len(self._running))
            for submission in self._submissions(self._running):
                self._end(submission, _engine_error("decoding", error))
            return
        for _ in range(waves):
            self._on_step(elapsed / waves)
        if taken:
            with self._changed:
                self._admission.learn(taken, elapsed)
        for running, result in taken:
            if self._running.get(result.slot) is not running:
                continue  # its request has ended with another slot of it
            try:
                if result.error is not None:
                    raise result.error
                self._take(running, result)
            except Exception as error:
                log.exception("decoding in slot %d failed", result.slot)
                self._end(running.submission, _engine_error("decoding", error))

    def _far(self) -> Until | None:
        """How far the next step goes; None: one wave, after which something may be due."""
        if any(each.request.previews for each in self._running.values()):
            return None
        if self._soonest is not None and self._soonest - time.perf_counter() <= STEP_SECONDS:
            return None
        return self._until

    def _take(self, running: Running, result: SlotStep) -> None:
        """What a step did for one slot."""
        running.report(result)
        if running.preview_is_due(result):
            with self.pulse.at_work():
                tokens, decoded = self.engine.unfinished(result.slot)
            self._painter.put(Picture(running.submission, running.request, 0, tokens, decoded))
        submission, over = running.submission, False
        if result.done:  # before its last pixels are begun, which may then have all cores
            self._vacate(result.slot)
            over = submission.all_finished
        if over:
            self._discard(submission)
        for index, tokens in result.frames:
            self._painter.put(Picture(submission, running.request, index, tokens))
        if over:
            self._painter.put(submission)

    def _not_painted(self, submission: Submission, error: Exception) -> None:
        """For the painter's thread: ends the request; its slots are emptied by the next sweep."""
        submission.handle.fail(_engine_error("making pixels", error))
        with self._changed:
            self._tell()

    def _submissions(self, slots: Iterable[int]) -> list[Submission]:
        """Whose samples hold `slots`, each once."""
        return list(dict.fromkeys(self._running[slot].submission for slot in slots))

    def _end(self, submission: Submission, error: Exception | None) -> None:
        """Ends a request: no sample of it waits or holds a slot any more. None: it has ended."""
        with self._changed:
            self._queue.remove(submission)
        for slot, running in list(self._running.items()):
            if running.submission is submission:
                self._vacate(slot)
        self._discard(submission)
        if error is not None:
            submission.handle.fail(error)
        with self._changed:  # not before: the device may be lost while a slot is emptied
            self._live.pop(submission.handle, None)

    def _vacate(self, slot: int) -> None:
        """Frees a slot."""
        with self._changed:
            running = self._running.pop(slot)
            running.submission.finished += 1
            self._tell()
        try:
            with self.pulse.at_work():
                self.engine.release(slot)
        except Exception:
            log.exception("the engine could not release slot %d", slot)

    def _discard(self, submission: Submission) -> None:
        """Makes room for another request to be prepared."""
        with self._changed:
            submission.discard()
            self._tell()


def _engine_error(doing: str, cause: Exception) -> EngineError:
    error = EngineError(f"the engine failed while {doing}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
