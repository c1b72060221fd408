"""Sends a workload's requests to a server, or to an engine in this process, and watches them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..client import BaseClient, ClientError
from ..core import Frame, ModelInfo, Pixels, Timings
from ..interceptor import CODES
from ..results import ClipDone
from .observation import OK, Observation
from .workload import Query, Workload

Ask = Callable[[int, float], Observation]  # (number of the query, when it was due)
Send = Callable[[float], Observation]  # (when it was due)


def prepared(ask: Ask, number: int) -> Send:
    """The query of that number, built now, so that building it counts as nobody's latency; what
    has no `prepare` builds it when it is sent.
    """
    prepare: Callable[[int], Send] | None = getattr(ask, "prepare", None)
    return partial(ask, number) if prepare is None else prepare(number)


@dataclass(frozen=True)
class Asker:
    """Called with a query's number and when it was due; or the query is prepared, and sent later.
    For any number of threads.

    client: one that does not retry; model: what requests name, "" where there is one only;
    deadline: seconds for one request.
    """

    client: BaseClient
    workload: Workload
    info: ModelInfo
    model: str = ""
    deadline: float | None = None

    def __call__(self, number: int, scheduled: float) -> Observation:
        return self.prepare(number)(scheduled)

    def prepare(self, number: int) -> Send:
        return partial(self._sent, self.workload.query(number, self.info, self.model))

    def _sent(self, query: Query, scheduled: float) -> Observation:
        frames: list[float] = []
        timings, status = Timings(), OK
        sent = time.perf_counter()
        try:
            if query.task.is_video:
                for event in self.client.stream_video(
                    query.task, query.prompt, deadline=self.deadline, **query.options
                ):
                    if isinstance(event, Frame):
                        frames.append(time.perf_counter())
                    elif isinstance(event, ClipDone):
                        timings = event.timings
            else:
                image = self.client.generate_image(
                    query.task, query.prompt, deadline=self.deadline, **query.options
                )
                timings = image.timings
        except Exception as error:
            status = reason_of(error)
        ended = time.perf_counter()
        if status == OK and not frames:
            frames = [ended]
        return Observation(scheduled, sent, ended, status, tuple(frames), timings)

    def check(self) -> Pixels:
        """Asks once, and what came; what is wrong with the request, or with the server, is raised
        as it is.
        """
        query = self.workload.query(0, self.info, self.model)
        if query.task.is_video:
            return self.client.generate_video(
                query.task, query.prompt, deadline=self.deadline, **query.options
            ).frames
        return self.client.generate_image(
            query.task, query.prompt, deadline=self.deadline, **query.options
        ).pixels


def reason_of(error: Exception) -> str:
    """As a server's error names it, wherever it was raised."""
    if isinstance(error, ClientError):
        return error.reason or error.code.name
    return next((entry[2] for entry in CODES if isinstance(error, entry[0])), type(error).__name__)
