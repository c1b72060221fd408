"""The gRPC server around a scheduler: ports, health, reflection, limits and an orderly end.

Knows neither bundles nor how requests are converted.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent import futures
from types import FrameType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nuwa.inference import grpc_service_pb2, grpc_service_pb2_grpc
from nuwa.v1 import generation_pb2, generation_pb2_grpc

from .auth import AuthInterceptor
from .engine_protocol import Engine
from .intake import Intake
from .interceptor import ErrorInterceptor
from .kserve.service import MAX_STREAMS, InferenceService
from .media import Limits
from .metrics import Metrics
from .notify import READY, STOPPING, notify
from .pages import Pages
from .reflected import Pools
from .scheduler import Scheduler
from .service import GenerationService
from .settings import LOOPBACK, ServerSettings
from .tls import Certificates
from .tokens import Tokens
from .tracing import Tracing
from .watch import Watch

log = logging.getLogger("nuwa.runtime")

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
KSERVE = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
VERSION = importlib.metadata.version("nuwa-runtime")
DEFAULT_GRACE = 30.0
SLOW_READERS = 16  # calls that may still be sending when their decoding is done
SPARE_THREADS = 8  # for health, reflection and GetModel


class Server:
    """Serves one engine. start(), then stop(); as a context manager it does both.

    settings: those of `nuwa serve`, without the ones that say which engine; or single ones by name,
    in place of the defaults. `address` says which port was taken. OSError if it cannot be had,
    ValueError for certificates or tokens that cannot be used.
    """

    def __init__(
        self, engine: Engine, settings: ServerSettings | None = None, **fields: Any
    ) -> None:
        settings = settings or ServerSettings(**{"port": 0, **fields})
        metrics = self.metrics = Metrics()
        self.scheduler = Scheduler(
            engine,
            queue_size=settings.queue_size,
            on_death=self._on_death,
            on_step=metrics.step,
            on_cancelled=metrics.cancelled,
        )
        self.asked_to_end = threading.Event()  # by a signal, or because nothing can be generated
        self._cut = threading.Event()  # ends the lame-duck time
        self.died = False
        max_calls = settings.queue_size + engine.slots + SLOW_READERS
        errors = ErrorInterceptor(engine.info.tasks, metrics.error)
        tokens = None if settings.tokens is None else Tokens(settings.tokens)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_calls + MAX_STREAMS + SPARE_THREADS, "nuwa-rpc"),
            interceptors=_interceptors(errors, tokens),
            options=_options(settings),
        )
        tracing = self._tracing = None
        if settings.trace_endpoint is not None:
            tracing = self._tracing = Tracing(settings.trace_endpoint, VERSION)
        intake = self.intake = Intake(
            self.scheduler,
            max_calls=max_calls,
            limits=Limits(
                settings.max_media_bytes, settings.max_media_pixels, settings.max_media_frames
            ),
            identify=None if tokens is None else _named_by(tokens),
            metrics=metrics,
            tracing=tracing,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(intake), self._server
        )
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            InferenceService(intake, ready=self.is_ready, told=errors.told), self._server
        )
        # Watch holds no thread this way, however many balancers watch.
        self._health = health.HealthServicer(
            experimental_non_blocking=True,
            experimental_thread_pool=futures.ThreadPoolExecutor(2, "nuwa-health"),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = (SERVICE, KSERVE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server, Pools())
        self.address = _listen(self._server, settings)
        self._describe()
        self._pages: Pages | None = None
        if settings.metrics_port is not None:
            self._pages = Pages(metrics.registry, settings.metrics_host, settings.metrics_port)
        self._watch = Watch(
            self.scheduler.pulse.longest,
            settings.hang_timeout,
            self._on_health,
            lambda: intake.cut_slow(settings.slow_reader_timeout),
        )
        self.lame_duck = settings.lame_duck
        self._stopped = False
        self._ready = False

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Takes requests from now on, and tells health checks so."""
        self.scheduler.start()
        self._server.start()
        self._on_health(True)
        self._watch.start()
        if self._pages is not None:
            self._pages.start()

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the metrics, where there are any."""
        return None if self._pages is None else self._pages.address

    def is_ready(self) -> bool:
        """Whether requests are taken, as health checks are told."""
        return self._ready

    def stop(self, grace: float = 0.0) -> None:
        """NOT_SERVING, after the lame-duck time no new calls, `grace` seconds for those at hand.

        Then the end of all. Without grace it comes at once.
        """
        if self._stopped:
            return
        self._stopped = True
        self._ready = False
        self._health.enter_graceful_shutdown()
        if grace:
            self._cut.wait(self.lame_duck)
        self._server.stop(grace).wait()
        self._watch.close()
        self.scheduler.close()
        if self._pages is not None:
            self._pages.close()
        if self._tracing is not None:
            self._tracing.close()

    def _describe(self) -> None:
        """What metrics say beside what is counted."""
        scheduler, engine, watch = self.scheduler, self.scheduler.engine, self.metrics.watch
        self.metrics.describe(engine.info, VERSION)
        watch("nuwa_slots_used", "Slots that decode a sample", lambda: scheduler.active)
        watch("nuwa_slots", "Slots there are", lambda: engine.slots)
        watch("nuwa_requests_waiting", "Requests that wait for a slot", lambda: scheduler.queued)
        watch("nuwa_queue_size", "Requests that may wait", lambda: scheduler.queue_size)
        watch("nuwa_calls_open", "Generations being answered", lambda: self.intake.open_calls)
        watch("nuwa_ready", "1 while requests are taken", lambda: self._ready)
        watch("nuwa_engine_busy_seconds", "Of the call under way", scheduler.pulse.longest)

    def _on_health(self, well: bool) -> None:
        if self._stopped or self.died:
            return
        self._ready = well
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE, KSERVE):
            self._health.set(name, status.SERVING if well else status.NOT_SERVING)

    def _on_death(self) -> None:
        self.died = True
        self._ready = False
        self._health.enter_graceful_shutdown()  # NOT_SERVING
        self.asked_to_end.set()

    def hasten(self) -> None:
        """Cuts the grace of a stop() that another thread is in."""
        self._cut.set()
        self._server.stop(0)


def serve_until_signal(
    server: Server, *, load_seconds: float = 0.0, grace: float = DEFAULT_GRACE
) -> None:
    """Starts, prints one line when ready, and returns after SIGTERM or SIGINT and a drain.

    A second signal cuts the drain. Also returns when nothing can be generated any more, which
    `server.died` says. Only for the main thread.
    """
    asked = server.asked_to_end
    previous = {}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            # Not from within the handler: it may have interrupted a lock that stop() needs.
            threading.Thread(target=server.hasten, daemon=True).start()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, on_signal)
    try:
        server.start()
        info = server.scheduler.engine.info
        print(
            f"nuwa: ready on {server.address}: {info.name} ({', '.join(info.tasks)}) "
            f"on {info.backend}, loaded in {load_seconds:.2f} s, {resident_megabytes():.0f} MB",
            flush=True,
        )
        notify(READY)
        asked.wait()
        notify(STOPPING)
        lame_duck = server.lame_duck
        log.info("draining: %g s more for new calls, then %g s for those at hand", lame_duck, grace)
        started = time.perf_counter()
        server.stop(grace)
        log.info("stopped after %.2f s", time.perf_counter() - started)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def resident_megabytes() -> float:
    """Memory of this process that is in RAM, in units of 10**6 bytes; 0 where /proc is missing."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Without this a second server on the port starts too, and gets half of the calls.
        ("grpc.so_reuseport", 0),
        # A waiting request is silent for long; clients may ask every 10 s if we live.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if settings.max_connection_age is not None:
        grace = settings.grace or DEFAULT_GRACE
        options += [
            ("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age)),
            ("grpc.max_connection_age_grace_ms", round(1000 * grace)),
        ]
    return options


def _interceptors(errors: ErrorInterceptor, tokens: Tokens | None) -> list[grpc.ServerInterceptor]:
    """The outermost first."""
    if tokens is None:
        return [errors]

    def refuse(error: Exception, context: grpc.ServicerContext) -> None:
        errors.abort(error, "a call", context)

    return [AuthInterceptor(tokens, refuse), errors]


def _named_by(tokens: Tokens) -> Callable[[grpc.ServicerContext], str]:
    def name(context: grpc.ServicerContext) -> str:
        return tokens.check(context.invocation_metadata(), "infer").name

    return name


def _listen(server: grpc.Server, settings: ServerSettings) -> str:
    """Binds a port; the address that clients connect to."""
    host, port = settings.host, settings.port
    if settings.insecure and settings.tls_certificate is None and host not in LOOPBACK:
        log.warning("listening on %s without encryption", host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    problem = f"cannot listen on {host}:{port}; is the port taken, or the host not of this machine?"
    try:
        if settings.tls_certificate is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            assert settings.tls_key is not None, "they go together"
            files = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
            bound = server.add_secure_port(f"{host}:{port}", files.credentials())
    except RuntimeError as error:
        raise OSError(problem) from error
    if bound == 0:
        raise OSError(problem)
    return f"{host}:{bound}"
