"""Over HTTP: /metrics for Prometheus, / for people, /livez and /readyz for orchestrators.

Those are for where gRPC needs TLS, or certificates of clients, which probes over gRPC have not.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

log = logging.getLogger("nuwa.runtime")

CONNECTIONS = 32  # at a time, each with a thread
REQUEST_SECONDS = 5.0  # in which a request has to come, all of it; and to take the answer
GIVE_WAY_SECONDS = 1.0  # in which the thread of a connection ends that is hung up on
HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"),
    ("X-Content-Type-Options", "nosniff"),
]
TEXT = ("Content-Type", "text/plain; charset=utf-8")
UNWELL = "a call of the engine hangs, or its device has failed"
UNREADY = "requests are not taken: models are being loaded, or there is none, or the server ends"


class Pages:
    """start() and close(). OSError if the port cannot be had; `address` says which it is.

    status: the page for people, as HTML. live: whether the process is well; ready: whether requests
    are taken. Both are asked often, so they have to be quick.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        status: Callable[[], str],
        host: str,
        port: int,
        *,
        live: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        self._metrics, self._status = make_wsgi_app(registry), status
        self._live, self._ready = live, ready
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            kind: type[_Server] = type("_Server", (_Server,), {"address_family": family})
            self._server = make_server(
                host, port, self._answer, server_class=kind, handler_class=_Quiet
            )
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} for metrics: {error}") from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="nuwa-metrics", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Harmless if it was never started."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start)
        if path == "/":
            start("200 OK", [("Content-Type", "text/html; charset=utf-8"), *HEADERS])
            return [self._status().encode()]
        if path == "/livez":
            problem = None if self._live() else UNWELL
        elif path == "/readyz":
            problem = None if self._ready() else (UNREADY if self._live() else UNWELL)
        else:
            start("404 Not Found", [TEXT, *HEADERS])
            return [b"there are /, /metrics, /livez and /readyz here\n"]
        start("503 Service Unavailable" if problem else "200 OK", [TEXT, *HEADERS])
        return [f"{problem or 'ok'}\n".encode()]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Has a thread for each of at most CONNECTIONS connections. Where there are as many, the one
    that has waited longest for its request gives way to the next, so that idle clients keep no
    probe out; where none waits for that, the next is closed at once.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4 * CONNECTIONS  # beyond it the kernel drops what comes, for a second

    def __init__(self, *arguments: Any) -> None:
        self._changed = threading.Condition()
        self._open: set[Any] = set()
        self._silent: dict[Any, float] = {}  # those without a request, since when; oldest first
        super().__init__(*arguments)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        with self._changed:
            if not self._has_room() and self._silent:
                self._hang_up(next(iter(self._silent)))
                self._changed.wait_for(self._has_room, GIVE_WAY_SECONDS)
            if not self._has_room():
                return False
            self._open.add(request)
            self._silent[request] = time.monotonic()
            return True

    def shutdown_request(self, request: Any) -> None:
        """The end of each connection, also of one for which there was no room."""
        super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._silent.pop(request, None)
            self._changed.notify_all()

    def arrived(self, request: Any) -> bool:
        """The request of a connection has come; False if nobody waits for it any more."""
        with self._changed:
            return self._silent.pop(request, None) is not None

    def service_actions(self) -> None:
        """Called every half a second: no client has longer because it sends a byte now and then."""
        before = time.monotonic() - REQUEST_SECONDS
        with self._changed:
            for request, since in list(self._silent.items()):
                if since < before:
                    self._hang_up(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of clients that leave or are slow nothing is told."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a connection to the metrics failed")

    def _has_room(self) -> bool:
        """Under the lock."""
        return len(self._open) < CONNECTIONS

    def _hang_up(self, request: Any) -> None:
        """Under the lock: its thread then reads that this is the end."""
        del self._silent[request]
        with contextlib.suppress(OSError):  # the client was faster
            request.shutdown(socket.SHUT_RDWR)


class _Quiet(WSGIRequestHandler):
    timeout = REQUEST_SECONDS  # for each read, and for the answer
    server: _Server

    def parse_request(self) -> bool:
        # What is cut off in the middle of its headers looks whole.
        return super().parse_request() and self.server.arrived(self.connection)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
