"""grpc.health.v1: Check, List and Watch, without work for the engine.

A watcher holds a thread of the server (lanes.py says how many may). The servicer of grpcio's own
package, which needs none, sends under a lock that its callbacks take too, and so can stop a server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .interceptor import shortened

NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
LOOK_SECONDS = 5.0  # how often a watcher is looked after if nothing changes

_STATUS = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Statuses by service, "" for the process. Safe to use from any thread."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = threading.Condition()
        self._ended = self._over = False

    def set(self, statuses: dict[str, bool]) -> None:
        """Whether services are well; nothing after end()."""
        with self._changed:
            if not self._ended:
                for name, well in statuses.items():
                    self._statuses[name] = _STATUS.SERVING if well else _STATUS.NOT_SERVING
                self._changed.notify_all()

    def end(self) -> None:
        """NOT_SERVING from now on, whatever is set."""
        with self._changed:
            self._ended = True
            self._statuses = dict.fromkeys(self._statuses, _STATUS.NOT_SERVING)
            self._changed.notify_all()

    def dismiss(self) -> None:
        """Ends watches once they have heard the last status, so that nobody waits for them."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            problem = shortened(f"there is no service {request.service!r}")
            context.abort(grpc.StatusCode.NOT_FOUND, problem)
        return _STATUS(status=status)

    def List(
        self, request: health_pb2.HealthListRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthListResponse:
        with self._changed:
            statuses = dict(self._statuses)
        return health_pb2.HealthListResponse(
            statuses={name: _STATUS(status=status) for name, status in statuses.items()}
        )

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        name = request.service
        del request  # a watch may last for ever, and is to keep no more than the name
        context.add_callback(self._wake)
        told: int | None = None
        while context.is_active():
            with self._changed:
                status = self._statuses.get(name, _STATUS.SERVICE_UNKNOWN)
                if status == told:
                    if self._over:
                        return
                    self._changed.wait(LOOK_SECONDS)
                    continue
            told = status
            yield _STATUS(status=status)  # not under the lock: it may take as long as it likes

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
