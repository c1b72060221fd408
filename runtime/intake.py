"""What every gRPC service does with a request: room for the call, a place in the queue, its events.

Knows no wire format but what a Job says; service.py and kserve/ make Jobs of their messages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc

from . import selection
from .convert import Job
from .core import Done, Event, QueueFullError
from .handle import Handle
from .host import Host, Loaded
from .logs import fields
from .media import DEFAULT_LIMITS, Limits
from .metrics import Metrics
from .tracing import Tracing

log = logging.getLogger("nuwa.runtime")

PHASES = ("total", "queue", "encode", "decode", "pixels", "ranking")
YEAR_SECONDS = 365 * 24 * 3600.0


@dataclass(eq=False)
class _Delivery:
    """since: when the event was handed over that is being sent."""

    context: grpc.ServicerContext
    request_id: str
    since: float | None = None


class Follower(Protocol):
    """Hears of each event of a request, or of the error that ends it."""

    def heard(self, event: Event) -> None: ...

    def failed(self, error: BaseException) -> None: ...


class Intake:
    """max_calls: generations at a time, waiting ones and slow readers included; identify: who makes
    a call, for fairness, by default its address.

    More are refused as QueueFullError, so that the server's threads never run out: with none left,
    health checks would go unanswered and refusals would wait behind what they refuse.
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
    ) -> None:
        self.host, self.limits = host, limits
        self._identify = identify or address_of
        self.metrics, self._tracing = metrics or Metrics(), tracing
        self._calls = threading.BoundedSemaphore(max_calls)
        self._deliveries: set[_Delivery] = set()

    @property
    def open_calls(self) -> int:
        """Generations whose events are being read."""
        return len(self._deliveries)

    @contextmanager
    def call(self, model: str, context: grpc.ServicerContext) -> Iterator[Loaded]:
        """Room for a call, and the model that it is to, while it lasts.

        QueueFullError if there is no room, here or in the model's queue, before any work is done
        for the request; NotFoundError and NotReadyError as Host.find.
        """
        if not self._calls.acquire(blocking=False):
            raise QueueFullError("the server has as many calls as it can hold")
        try:
            with self.host.use(model) as loaded:
                loaded.scheduler.check_room(self._identify(context))
                yield loaded
        finally:
            self._calls.release()

    def events(
        self,
        loaded: Loaded,
        job: Job,
        context: grpc.ServicerContext,
        timeout: float | None = None,
    ) -> Iterator[Event]:
        """Queues a job now; its events, as Handle.events gives and raises them.

        It ends with its call, by the call's deadline, or after `timeout` seconds.
        """
        followers = self._followers(loaded, job, context)
        try:
            handle = self._submit(loaded, job, context, timeout)
        except Exception as error:
            for follower in followers:
                follower.failed(error)
            raise
        events = selection.events_of(handle, job.samples, loaded.engine.rankers)
        return self._followed(job, events, context, followers)

    def _followers(self, loaded: Loaded, job: Job, context: grpc.ServicerContext) -> list[Follower]:
        """Of a request that begins now."""
        generation = job.generation
        followers: list[Follower] = [self.metrics.begin(loaded.name, generation.task)]
        if self._tracing is not None:
            attributes = {
                "nuwa.request_id": job.request_id,
                "nuwa.model": loaded.title,
                "nuwa.task": str(generation.task),
                "nuwa.frames": generation.frame_count,
                "nuwa.samples": job.samples.count,
            }
            name = f"generate {generation.task}"
            followers.append(self._tracing.begin(name, attributes, context.invocation_metadata()))
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
        )
        if not context.add_callback(handle.cancel):
            handle.cancel()  # the client left before there was something to cancel
        return handle

    def cut_slow(self, seconds: float) -> None:
        """Cancels calls whose client has not taken an answer for so long."""
        now = time.monotonic()
        for delivery in list(self._deliveries):
            if delivery.since is not None and now - delivery.since > seconds:
                self._deliveries.discard(delivery)
                told = fields(request_id=delivery.request_id)
                log.warning("%s: slow reader; cancelled", delivery.request_id, extra=told)
                delivery.context.cancel()

    def _followed(
        self,
        job: Job,
        events: Iterator[Event],
        context: grpc.ServicerContext,
        followers: list[Follower],
    ) -> Iterator[Event]:
        delivery = _Delivery(context, job.request_id)
        self._deliveries.add(delivery)
        try:
            for event in events:
                for follower in followers:
                    follower.heard(event)
                if isinstance(event, Done):
                    _tell(job, event)
                delivery.since = time.monotonic()
                yield event  # returns when it is sent: a client that does not read delays that
                delivery.since = None
        except BaseException as error:
            for follower in followers:
                follower.failed(error)
            raise
        finally:
            self._deliveries.discard(delivery)


def address_of(context: grpc.ServicerContext) -> str:
    """Who calls: the address of gRPC's "ipv4:127.0.0.1:50312", whatever the port."""
    return context.peer().rpartition(":")[0]


def _tell(job: Job, event: Done) -> None:
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
            task=str(generation.task),
            frames=frames,
            samples=job.samples.count,
            steps=times.steps,
            **{f"{name}_seconds": round(getattr(times, name), 6) for name in PHASES},
        ),
    )
