"""What every gRPC service does with a request: room for the call, a place in the queue, its events.

Knows no wire format but what a Job says; service.py and kserve/ make Jobs of their messages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc

from nuwa.spec.tasks import Task

from . import selection
from .answers import Answers
from .convert import Job
from .core import Done, Event, QueueFullError
from .errors import FieldError
from .handle import Handle
from .host import Host, Loaded
from .lanes import KEPT
from .logs import fields
from .media import DEFAULT_LIMITS, Limits
from .metrics import AGAIN, OK, Metrics, outcome_of
from .patience import Patience
from .tracing import Tracing

log = logging.getLogger("nuwa.runtime")

PHASES = ("total", "queue", "encode", "decode", "prefill", "pixels", "ranking")
M = TypeVar("M")
YEAR_SECONDS = 365 * 24 * 3600.0


class Follower(Protocol):
    """Hears of each event of a request, or of the error that ends it."""

    def heard(self, event: Event) -> None: ...

    def failed(self, error: BaseException) -> None: ...


@dataclass(frozen=True)
class Origin:
    """What an answer was made for, and by which model. title: its name with its version."""

    request_id: str
    task: Task
    model: str
    title: str

    @classmethod
    def of(cls, job: Job, loaded: Loaded) -> Origin:
        return cls(job.request_id, job.generation.task, loaded.name, loaded.title)


class Intake:
    """max_calls: generations at a time, waiting ones and slow readers included; identify: who makes
    a call, for fairness, by default who_calls; patience: of how long a client may take to read,
    `slow_reader_timeout` seconds; most_unread: as Handle.
    """

    def __init__(
        self,
        host: Host,
        *,
        max_calls: int,
        limits: Limits = DEFAULT_LIMITS,
        identify: Callable[[grpc.ServicerContext], str] | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        patience: Patience | None = None,
        slow_reader_timeout: float = 60.0,
        most_unread: int | None = None,
    ) -> None:
        self.host, self.limits = host, limits
        self._most_unread = most_unread
        self._patience, self._slow = patience or Patience(), slow_reader_timeout
        self._identify = identify or who_calls
        self.metrics, self._tracing = metrics or Metrics(), tracing
        self.answers = Answers()
        self._calls = threading.BoundedSemaphore(max_calls)
        self._lock = threading.RLock()  # a reader that is left while it is held takes it again
        self._live: dict[grpc.ServicerContext, set[Handle]] = {}  # requests by their calls

    @property
    def open_calls(self) -> int:
        """Generations that are being answered."""
        with self._lock:
            return sum(map(len, self._live.values()))

    @contextmanager
    def room(self) -> Iterator[None]:
        """Room for a call while it lasts; QueueFullError if there is none."""
        if not self._calls.acquire(blocking=False):
            full = QueueFullError("the server has as many calls as it can hold")
            self.refused(full)
            raise full
        try:
            yield
        finally:
            self._calls.release()

    def refused(self, error: Exception) -> None:
        """Counts a generation that was refused before it was known what model it is to."""
        loaded = self.host.loaded
        self.metrics.refused(loaded[0].name if loaded else "", error)

    def answered_again(self, context: grpc.ServicerContext, since: float, origin: Origin) -> None:
        """Tells of a call that came at `since`, of time.perf_counter, and gets a kept answer."""
        seconds = time.perf_counter() - since
        self.metrics.answered_again(origin.model, origin.task)
        told = {
            "request_id": origin.request_id,
            "model": origin.title,
            "task": str(origin.task),
            "outcome": AGAIN,
        }
        if self._tracing is not None:
            self._tracing.answered(f"again {origin.task}", told, context, seconds)
        log.info(
            "%s %s: the answer that was kept, after %.3f s",
            origin.request_id,
            origin.task,
            seconds,
            extra=fields(**told, total_seconds=round(seconds, 6)),
        )

    def crowded(self, context: grpc.ServicerContext, method: str) -> None:
        """QueueFullError if no model's queue has room for a request of this client, and no kept
        answer can be the one to it.
        """
        if method in KEPT and len(self.answers):
            return
        client, full = self._identify(context), None
        for loaded in self.host.loaded:
            try:
                loaded.scheduler.check_room(client, certain=False)
                return
            except QueueFullError as error:
                full = full or (loaded, error)
        if full is None:
            return
        self.metrics.refused(full[0].name, full[1])
        for loaded in self.host.loaded:  # it is to one of them, from which others take its room
            with suppress(QueueFullError):
                loaded.scheduler.check_room(client)
        raise full[1]

    @contextmanager
    def model(self, name: str, context: grpc.ServicerContext) -> Iterator[Loaded]:
        """The model that a call is to, while it lasts.

        NotFoundError and NotReadyError as Host.find; QueueFullError if its queue has no room,
        before any work is done for the request.
        """
        with self.host.use(name) as loaded:
            try:
                loaded.scheduler.check_room(self._identify(context))
            except QueueFullError as error:
                self.metrics.refused(loaded.name, error)
                raise
            yield loaded

    def sending(
        self, context: grpc.ServicerContext, title: str, messages: Iterator[M]
    ) -> Iterator[M]:
        """The messages of an answer; watches whether the client takes each."""
        what = f"{title}: its reader took nothing for {self._slow:g} s"
        for message in messages:
            with self._patience.waiting(context, what, self._slow):
                yield message  # returns when it is sent: a client that does not read delays that

    def events(
        self,
        loaded: Loaded,
        job: Job,
        context: grpc.ServicerContext,
        timeout: float | None = None,
        *,
        whole: bool = False,
        instead: str = "",
    ) -> Iterator[Event]:
        """Queues a job now; its events, as Handle.events gives and raises them.

        It ends with its call, by the call's deadline, or after `timeout` seconds. whole: its answer
        is one message; instead: the method that answers the same piece by piece, if one does.
        FieldError where the frames that have to wait for each other, for that, for an animation or
        until all are ranked, are more than may be unread.
        """
        followers = self._followers(loaded, job, context)
        try:
            self._check_held(loaded, job, whole=whole, instead=instead)
            handle = self._submit(loaded, job, context, timeout)
        except Exception as error:
            _ended(loaded, job, followers, error, time.perf_counter())
            raise
        events = selection.events_of(handle, job.samples, loaded.engine.rankers)
        return self._followed(loaded, job, events, context, handle, followers)

    def _check_held(self, loaded: Loaded, job: Job, *, whole: bool, instead: str) -> None:
        samples, generation, info = job.samples, job.generation, loaded.engine.info
        frames, held, why = generation.frame_count, 0, ""
        if job.output.animation:  # of one sample
            held, why = 1, "for the animation"
        if whole:
            held, why = samples.returned, "for one answer"
        if samples.rank_by:  # the best so far, and those that are being made
            held = min(samples.count, samples.returned + loaded.engine.slots)
            why = "until all samples are ranked"
        scaled = whole and job.output.kind == "raw" and job.output.scale > 1
        frame = info.height * info.width * 3 * (job.output.scale**2 if scaled else 1)
        most, size = self._most_unread, held * frames * frame
        if most is None or size <= most:
            return
        if samples.returned > 1 and samples.rank_by:
            field = "return_count"
        elif held > 1:
            field = "sample_count"
        elif frames > 1:
            field = "frame_count"
        else:  # nothing else in the request makes a single image smaller
            field = "output.scale_factor" if scaled else ""
        instead = f", or with {instead}" if instead and not samples.rank_by else ""
        raise FieldError(
            field,
            f"{_many(held, 'sample')} of {_many(frames, 'frame')} would have to be kept {why}, "
            f"{size / 1e6:.0f} MB; the server's max_unread_bytes allows {most / 1e6:.0f} MB. Ask "
            f"for less at a time{instead}",
        )

    def _followers(self, loaded: Loaded, job: Job, context: grpc.ServicerContext) -> list[Follower]:
        """Of a request that begins now."""
        generation = job.generation
        followers: list[Follower] = [self.metrics.begin(loaded.name, generation.task, loaded.title)]
        if self._tracing is not None:
            attributes = {
                "request_id": job.request_id,
                "model": loaded.title,
                "task": str(generation.task),
                "frames": generation.frame_count,
                "samples": job.samples.count,
            }
            name = f"generate {generation.task}"
            followers.append(self._tracing.begin(name, attributes, context))
        return followers

    def _submit(
        self, loaded: Loaded, job: Job, context: grpc.ServicerContext, timeout: float | None
    ) -> Handle:
        remaining = context.time_remaining()  # centuries when the client set no deadline
        if remaining is not None and remaining < YEAR_SECONDS:
            timeout = remaining if timeout is None else min(timeout, remaining)
        handle = loaded.scheduler.submit(
            job.generation,
            samples=job.samples.count,
            timeout=timeout,
            client=self._identify(context),
            most_unread=self._most_unread,
        )
        self._cancel_with(context, handle)
        return handle

    def _followed(
        self,
        loaded: Loaded,
        job: Job,
        events: Iterator[Event],
        context: grpc.ServicerContext,
        handle: Handle,
        followers: list[Follower],
    ) -> Iterator[Event]:
        try:
            for event in events:
                for follower in followers:
                    follower.heard(event)
                if isinstance(event, Done):
                    _tell(loaded, job, event)
                yield event
        except GeneratorExit:  # as where the call has ended
            _ended(loaded, job, followers, handle.reason_to_leave(), handle.submitted)
            raise
        except BaseException as error:
            _ended(loaded, job, followers, error, handle.submitted)
            raise
        finally:
            with self._lock:
                self._live.get(context, set()).discard(handle)

    def _cancel_with(self, context: grpc.ServicerContext, handle: Handle) -> None:
        """Cancels a handle when its call ends, which may be one of thousands in a stream."""
        with self._lock:
            known = context in self._live
            self._live.setdefault(context, set()).add(handle)
        if not known and not context.add_callback(lambda: self._call_ended(context)):
            self._call_ended(context)  # the client left before there was something to cancel

    def _call_ended(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            left = self._live.pop(context, set())
        for handle in left:
            handle.cancel()


def who_calls(context: grpc.ServicerContext) -> str:
    """By the certificate that the client shows, or else by its address, whatever the port: gRPC
    says "ipv4:127.0.0.1:50312".
    """
    identities = context.peer_identities()
    if identities:
        return next(iter(identities)).decode(errors="replace")
    return context.peer().rpartition(":")[0]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _ended(
    loaded: Loaded, job: Job, followers: list[Follower], error: BaseException, since: float
) -> None:
    """Without its result."""
    for follower in followers:
        follower.failed(error)
    outcome, seconds = outcome_of(error), time.perf_counter() - since
    told = fields(
        request_id=job.request_id,
        model=loaded.title,
        task=str(job.generation.task),
        outcome=outcome,
        total_seconds=round(seconds, 6),
    )
    log.info(
        "%s %s: %s after %.3f s", job.request_id, job.generation.task, outcome, seconds, extra=told
    )


def _tell(loaded: Loaded, job: Job, event: Done) -> None:
    times, generation = event.timings, job.generation
    frames = generation.frame_count * job.samples.count
    log.info(
        "%s %s: %d frames, %d steps, %.3f s (queue %.3f, encode %.3f, decode %.3f, pixels %.3f, "
        "ranking %.3f)",
        job.request_id,
        generation.task,
        frames,
        times.steps,
        times.total,
        times.queue,
        times.encode,
        times.decode,
        times.pixels,
        times.ranking,
        extra=fields(
            request_id=job.request_id,
            model=loaded.title,
            task=str(generation.task),
            outcome=OK,
            frames=frames,
            samples=job.samples.count,
            steps=times.steps,
            **{f"{name}_seconds": round(getattr(times, name), 6) for name in PHASES},
        ),
    )
