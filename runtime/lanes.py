"""Which threads answer a call, and how many calls of its kind may be open.

Each kind has its own threads, so that idle streams, clients that are slow to send and loads of
models keep neither generations nor health checks waiting. What is beyond a kind's number is refused
at once, by threads that do nothing else; but a call that has sent no request gives way to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from .core import QueueFullError
from .patience import Patience

NUWA, KSERVE = "/nuwa.v1.GenerationService/", "/inference.GRPCInferenceService/"
GENERATING = frozenset(
    {
        f"{NUWA}GenerateImage",
        f"{NUWA}StreamImage",
        f"{NUWA}GenerateVideo",
        f"{KSERVE}ModelInfer",
    }
)
KEPT = frozenset({f"{NUWA}GenerateImage"})  # whose answers are kept for those who ask again
ADMIN = (
    f"{KSERVE}RepositoryModel",
    "/nuwa.v1.ModelService/ReloadModel",
    "/nuwa.v1.ModelService/UnloadModel",
)
PROBES = (
    "/grpc.health.v1.Health/Check",
    f"{KSERVE}ServerLive",
    f"{KSERVE}ServerReady",
    f"{KSERVE}ModelReady",
)
WATCHES = ("/grpc.health.v1.Health/Watch",)
STREAMS = (f"{KSERVE}ModelStreamInfer",)
REFLECTION = ("/grpc.reflection.",)
# By the first of these that a method begins with; else "other", such as metadata.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("generations", tuple(GENERATING)),
    ("probes", PROBES),
    ("watches", WATCHES),
    ("streams", STREAMS),
    ("reflections", REFLECTION),
    ("loads", ADMIN),
)
OTHER = "other"
# Calls of a kind that may be open at a time, where no setting decides.
SIZES = {"probes": 32, "reflections": 16, "loads": 4, OTHER: 32}
REFUSING_THREADS = 16
MAX_METHOD = 200  # characters of it that are told: a client may name any
SILENT_SECONDS = 1.0  # after which a call without a request gives way to others

# refuse(error, method, context): ends a call of that method with the error's status.
Refuse = Callable[[Exception, str, grpc.ServicerContext], Any]


def kind_of(method: str) -> str:
    """Of a call of /package.Service/Method."""
    return next((kind for kind, beginnings in KINDS if method.startswith(beginnings)), OTHER)


class Lanes(grpc.ServerInterceptor):
    """Goes around what reads requests. sizes: by kind; on_refused: hears of generations' errors.

    `refusing` is the pool that the server itself is made with. close() when the server has ended.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        refuse: Refuse,
        on_refused: Callable[[Exception], None],
        patience: Patience,
    ) -> None:
        self.refusing = futures.ThreadPoolExecutor(REFUSING_THREADS, "nuwa-refusals")
        self._lanes = {kind: _Lane(kind, size, patience) for kind, size in sizes.items()}
        self._refuse, self._on_refused = refuse, on_refused

    def intercept_service(self, continuation: Callable, details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        lane = self._lanes[kind_of(details.method)]
        if lane.enter():
            return lane.wrapped(handler)
        if details.method in GENERATING:
            self._on_refused(lane.full)
        return refusal(self._refuse, lane.full, details.method)

    def close(self) -> None:
        """Does not wait for calls that are still open."""
        for pool in (self.refusing, *(lane.pool for lane in self._lanes.values())):
            pool.shutdown(wait=False)


class _Lane:
    def __init__(self, kind: str, size: int, patience: Patience) -> None:
        self.pool = futures.ThreadPoolExecutor(size, f"nuwa-{kind}")
        self._size, self._patience = size, patience
        self._lock = threading.Lock()
        self._open = 0  # calls that have entered, for a moment also those that are giving way
        self._running: set[grpc.ServicerContext] = set()  # those of them that have a thread
        self._problem = f"the server has {size} calls of this kind ({kind}) open, as many as it can"

    @property
    def full(self) -> Exception:
        return QueueFullError(self._problem)

    def enter(self) -> bool:
        """Whether there is room; if so, what `wrapped` gives has to be called."""
        with self._lock:
            if self._open >= self._size and not self._patience.make_room(
                self._running, SILENT_SECONDS
            ):
                return False
            self._open += 1
        return True

    @contextmanager
    def _inside(self, context: grpc.ServicerContext) -> Iterator[None]:
        """While a call that has entered has a thread; then it leaves."""
        with self._lock:
            self._running.add(context)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(context)
                self._open -= 1

    def wrapped(self, handler: Any) -> Any:
        """A handler of streams of requests, in this lane's threads, which leaves it at its end.

        Only those are called for certain: of one for a single request gRPC calls nothing if the
        client leaves before it has sent it.
        """
        assert handler.request_streaming, "interceptor.py makes all so"
        codecs = handler.request_deserializer, handler.response_serializer
        behaviour: Any
        if handler.response_streaming:
            behaviour = self._leaving_stream(handler.stream_stream)
            make = grpc.stream_stream_rpc_method_handler
        else:
            behaviour = self._leaving(handler.stream_unary)
            make = grpc.stream_unary_rpc_method_handler
        behaviour.experimental_thread_pool = self.pool
        return make(behaviour, *codecs)

    def _leaving(self, behaviour: Callable) -> Callable:
        def leaving(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._inside(context):
                return behaviour(requests, context)

        return leaving

    def _leaving_stream(self, behaviour: Callable) -> Callable:
        def leaving(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._inside(context):
                yield from behaviour(requests, context)

        return leaving


def refusal(refuse: Refuse, error: Exception, method: str) -> Any:
    """A handler that ends its call, of this method, with this error, and reads nothing before."""

    def refusing(requests: Any, context: grpc.ServicerContext) -> Any:
        refuse(error, method[:MAX_METHOD], context)
        yield

    return grpc.stream_stream_rpc_method_handler(refusing)
