"""Over HTTP: /metrics for Prometheus, / for people, /livez and /readyz for orchestrators.

Those are for where gRPC needs TLS, or certificates of clients, which probes over gRPC have not.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

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
    daemon_threads = True
    allow_reuse_address = True


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds for a request to arrive

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
