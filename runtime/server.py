"""The gRPC server around a scheduler: ports, health, reflection, limits and an orderly end.

Knows neither bundles nor how requests are converted.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nuwa.inference import grpc_service_pb2, grpc_service_pb2_grpc
from nuwa.v1 import generation_pb2, generation_pb2_grpc

from .arrival import Arrival
from .auth import AuthInterceptor
from .bundle import manifest_hash
from .engine_protocol import Engine
from .errors import DeviceLostError
from .gauges import Gauges
from .health import NAME as HEALTH
from .health import Health
from .history import History, taken
from .host import Host, Loaded
from .intake import Intake
from .interceptor import ErrorInterceptor
from .kserve.service import InferenceService
from .lanes import SIZES, Lanes
from .media import Limits
from .metrics import Metrics
from .pages import Pages
from .patience import Patience
from .process import give_way, resident_megabytes, settle, trim
from .reflected import Pools
from .scheduler import Scheduler
from .service import GenerationService, ModelService
from .settings import LOOPBACK, ServerSettings
from .status_page import Facts, ModelRow, page
from .tls import Certificates
from .tokens import Tokens
from .tracing import Tracing
from .watch import Watch

log = logging.getLogger("nuwa.runtime")

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
MODELS = generation_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
KSERVE = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
VERSION = importlib.metadata.version("nuwa-runtime")
TRIM_SECONDS = 30.0
AGE_GRACE = 600.0  # seconds that calls may go on in a connection that has reached its age
SLOW_READERS = 16  # calls of a model that may still be sending when their decoding is done
MOST_CALLS = 1024  # generations, each with a thread, where not one model alone needs more
# Calls that one connection may have open at least. A Python process has one for all its channels to
# an address, and `nuwa bench` 512 calls at a time.
LEAST_STREAMS = 640


class Server:
    """Serves bundles. start(), then stop(); as a context manager it does both.

    engine: one to serve from the start; more with `load`. settings: those of `nuwa serve`; or
    single ones by name, in place of the defaults. open_engine: how `load` gets an engine of a
    bundle. `address` says which port was taken. OSError if it cannot be had, ValueError for
    certificates or tokens that cannot be used. owns_process: whether it may change what is the
    process's, as its garbage collector and priorities (process.py).
    """

    def __init__(
        self,
        engine: Engine | None = None,
        settings: ServerSettings | None = None,
        *,
        open_engine: Callable[[Path], Engine] | None = None,
        **fields: Any,
    ) -> None:
        settings = self.settings = settings or ServerSettings(**{"port": 0, **fields})
        self.asked_to_end = threading.Event()  # by a signal, or because nothing can be generated
        self._cut = threading.Event()  # ends the lame-duck time
        self.died = self._stopped = self._started = False
        self._well = True
        self.owns_process = False
        self._unsettled = threading.Event()
        self._trimmed = time.monotonic()
        metrics = self.metrics = Metrics()
        self._telling, self._reloading = threading.Lock(), threading.Lock()
        self._health = Health()
        self.host = Host(open_engine or self._open_engine, self._schedule, self._on_models)
        if engine is not None:
            self.host.add(engine)
        tracing = self._tracing = None
        if settings.trace_endpoint is not None:
            tracing = self._tracing = Tracing(settings.trace_endpoint, VERSION)
        tokens = None if settings.tokens is None else Tokens(settings.tokens)
        patience = self._patience = Patience()
        max_calls = _most_calls(settings)
        intake = self.intake = Intake(
            self.host,
            max_calls=max_calls,
            limits=Limits(
                settings.max_media_bytes, settings.max_media_pixels, settings.max_media_frames
            ),
            identify=None if tokens is None else _named_by(tokens),
            metrics=metrics,
            tracing=tracing,
            patience=patience,
            slow_reader_timeout=settings.slow_reader_timeout,
            most_unread=settings.max_unread_bytes,
        )
        arrival = Arrival(patience, settings.slow_sender_timeout, intake.crowded)
        errors = ErrorInterceptor(
            arrival,
            intake.sending,
            _awaited(patience, settings.slow_reader_timeout),
            metrics.error,
            tracing,
        )
        self._refusals = errors.refusals
        sizes = SIZES | {
            "generations": max_calls,
            "watches": settings.max_watches,
            "streams": settings.max_streams,
        }
        self._lanes = Lanes(sizes, errors.abort, intake.refused, patience)
        self._server = grpc.server(
            self._lanes.refusing,
            interceptors=_interceptors(self._lanes, errors, tokens, settings.host in LOOPBACK),
            options=_options(settings, max(LEAST_STREAMS, sum(sizes.values()))),
        )
        self._inference = InferenceService(
            intake, live=self.is_live, ready=self.is_ready, told=errors.told
        )
        self._add_services(intake)
        self.address = _listen(self._server, settings)
        metrics.collect(Gauges(self))
        self._born = time.monotonic()
        self._history = History(taken(metrics.registry))
        self._pages = self._make_pages()
        self._watch = Watch(
            self.busy_seconds,
            settings.hang_timeout,
            self._on_health,
            self._look_after,
        )

    def _add_services(self, intake: Intake) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(intake), self._server
        )
        generation_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(self.host), self._server
        )
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            self._inference, self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self.settings.reflection:
            names = (SERVICE, MODELS, KSERVE, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server, Pools())

    def _make_pages(self) -> Pages | None:
        host, port = self.settings.metrics_host, self.settings.metrics_port
        if port is None:
            return None
        if host not in LOOPBACK:
            log.warning("metrics and the status page on %s, without encryption or tokens", host)
        return Pages(
            self.metrics.registry,
            self.status_page,
            host,
            port,
            live=self.is_live,
            ready=self.is_ready,
        )

    def _open_engine(self, path: Path) -> Engine:
        from .engine import load_engine  # with the backends' libraries

        settings = self.settings

        def load() -> Engine:
            self._give_way()
            return load_engine(
                path, slots=settings.slots, threads=settings.threads, backend=settings.backend
            )

        # In a thread of its own, whose priority those have that the backend starts.
        with futures.ThreadPoolExecutor(1, "nuwa-open") as pool:
            try:
                return pool.submit(load).result()
            except DeviceLostError:
                self._on_death()
                raise

    def _give_way(self) -> None:
        if self.owns_process:
            give_way()

    def _schedule(self, engine: Engine, name: str) -> Scheduler:
        return Scheduler(
            engine,
            queue_size=self.settings.queue_size,
            on_death=self._on_death,
            on_step=partial(self.metrics.step, name),
            on_cancelled=partial(self.metrics.cancelled, name),
            on_thread=self._give_way,
        )

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Answers from now on; requests are taken once a model is loaded, as health checks tell."""
        self._started = True
        self._server.start()
        self._tell_health()
        self._watch.start()
        if self._pages is not None:
            self._pages.start()
            self._history.start()

    def load(self, name: str, path: Path, *, beside: bool = False) -> Loaded:
        """As Host.load."""
        return self.host.load(name, path, beside=beside)

    def reload(self) -> None:
        """Loads all models again whose bundles have changed; those that cannot be stay as they are.

        For who asks by a signal: what goes wrong is in the log.
        """
        with self._reloading:
            self._reload()

    def _reload(self) -> None:
        for name in dict.fromkeys(each.name for each in self.host.loaded):
            try:
                found = self.host.find(name)
                if found.path is None or manifest_hash(found.path) == found.engine.info.bundle_hash:
                    log.info("%s is as it was", found.title)
                else:
                    self.host.reload(name)
            except Exception:
                log.exception("%s could not be loaded again", name)

    @property
    def scheduler(self) -> Scheduler:
        """That of the default model."""
        return self.host.find().scheduler

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the metrics, where there are any."""
        return None if self._pages is None else self._pages.address

    def is_live(self) -> bool:
        """Whether no call of an engine hangs and no device has failed; also while the server ends,
        which health checks call NOT_SERVING.
        """
        return self._well and not self.died

    def is_ready(self) -> bool:
        """Whether requests are taken, as health checks are told."""
        there = self._started and self._well and not (self._stopped or self.died)
        return there and self.host.complete

    def status_page(self) -> str:
        """What the server does, for people, as HTML."""
        models = [
            ModelRow(
                each.title,
                ", ".join(task.upper() for task in each.engine.info.tasks),
                each.engine.info.backend,
                each.engine.info.precision,
                each.engine.slots,
                each.scheduler.active,
                each.scheduler.queued,
                each.scheduler.queue_size,
                each.engine.info.bundle_hash,
            )
            for each in self.host.loaded
        ]
        up = time.monotonic() - self._born
        facts = Facts(VERSION, self.address, self.is_ready(), up, resident_megabytes(), models)
        return page(facts, self._history.points, self.metrics.registry)

    def busy_seconds(self) -> float:
        """Of the call of an engine that has lasted longest, 0 while none is under way."""
        return max((each.scheduler.pulse.longest() for each in self.host.running), default=0.0)

    def stop(self, grace: float = 0.0) -> None:
        """NOT_SERVING, after the lame-duck time no new calls, `grace` seconds for those at hand.

        Then the end of all. Without grace it comes at once.
        """
        if self._stopped:
            return
        self._stopped = True
        self._health.end()
        if grace:
            self._cut.wait(self.settings.lame_duck)
        self._health.dismiss()
        self._inference.dismiss()
        self._server.stop(grace).wait()
        self._lanes.close()
        self._watch.close()
        self._refusals.tell(last=True)
        self.host.close()
        if self._pages is not None:
            self._pages.close()
        self._history.close()
        if self._tracing is not None:
            self._tracing.close()

    def _on_models(self) -> None:
        self._tell_health()
        self._unsettled.set()

    def _look_after(self) -> None:
        self._patience.look()
        self._refusals.tell()
        if not self.owns_process:
            return
        if self._unsettled.is_set():
            self._unsettled.clear()
            settle()
        if time.monotonic() - self._trimmed > TRIM_SECONDS:
            trim()
            self._trimmed = time.monotonic()

    def _on_health(self, well: bool) -> None:
        self._well = well
        self._tell_health()

    def _tell_health(self) -> None:
        """ "" is the process, which is well while it loads; the services are ready with a model."""
        with self._telling:  # or what is told last may not be what is true last
            ready = self.is_ready()
            self._health.set({"": self._well, SERVICE: ready, KSERVE: ready})

    def _on_death(self) -> None:
        self.died = True
        self._health.end()
        self.asked_to_end.set()

    def hasten(self) -> None:
        """Cuts the grace of a stop() that another thread is in."""
        self._cut.set()
        self._server.stop(0)


def _most_calls(settings: ServerSettings) -> int:
    """Generations that may be open, so many that a model whose queue is full leaves the others
    theirs.

    A bundle can be loaded again, and then one version more has calls: it takes over, or stays
    beside. An engine that was given cannot. Threads are made only as calls come.
    """
    one = settings.queue_size + settings.slots + SLOW_READERS
    bundles = len(settings.bundles) + (settings.bundle is not None)
    return max(one, min((bundles + 1) * one, MOST_CALLS)) if bundles else one


def _awaited(patience: Patience, seconds: float) -> Callable[[grpc.ServicerContext, str], None]:
    """Has calls cancelled whose one answer, which no thread waits for, is not taken in time."""

    def sent(context: grpc.ServicerContext, method: str) -> None:
        what = f"{method}: its answer was not taken for {seconds:g} s"
        waiting = patience.waiting(context, what, seconds)
        waiting.__enter__()
        taken = partial(waiting.__exit__, None, None, None)
        if not context.add_callback(taken):
            taken()  # the call is over

    return sent


def _options(settings: ServerSettings, most_streams: int = LEAST_STREAMS) -> list[tuple[str, int]]:
    """most_streams: calls of one connection; a client keeps back what is beyond."""
    options = [
        # What a client does not take waits in gRPC, where nothing else bounds it.
        ("grpc.max_concurrent_streams", most_streams),
        # Which counts calls that are over, too, while they are cleaned up, and then refuses some of
        # a client that keeps to the number: those fail as UNAVAILABLE.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Without this a second server on the port starts too, and gets half of the calls.
        ("grpc.so_reuseport", 0),
        # A waiting request is silent for long; clients may ask every 10 s if we live.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that is gone without a word is found out, and its calls end.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # which decides in the gRPC of today
    ]
    if settings.max_connection_age is not None:
        options += [
            ("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age)),
            ("grpc.max_connection_age_grace_ms", round(1000 * AGE_GRACE)),
        ]
    return options


def _interceptors(
    lanes: Lanes, errors: ErrorInterceptor, tokens: Tokens | None, local: bool
) -> list[grpc.ServerInterceptor]:
    """The outermost first. local: whether only this machine reaches the server."""
    return [AuthInterceptor(tokens, errors.abort, local=local), lanes, errors]


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
