"""Turns whatever a call raises into a gRPC status with google.rpc details, at the one place for it.

The service raises plain exceptions; clients get a code, a sentence, an ErrorInfo and, for a bad
value, the field's name. What is not the caller's doing is logged in full and told in no detail.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from nuwa.spec.manifest import BundleError

from .arrival import Arrival
from .core import CancelledError, QueueFullError, UnsupportedTaskError
from .errors import (
    DeadlineExceededError,
    DeadlineTooShortError,
    DeviceLostError,
    FieldError,
    ForbiddenError,
    NotFoundError,
    NotReadyError,
    RequestError,
    ShuttingDownError,
    UnauthenticatedError,
    UnimplementedError,
)
from .lanes import GENERATING, MAX_METHOD, STREAMS, refusal
from .logs import fields
from .refusals import Refusals
from .tracing import Tracing
from .wire import reader

log = logging.getLogger("nuwa.runtime")

DOMAIN = "nuwa.v1"
GUARDED = ("/nuwa.v1.", "/inference.")
PUSHBACK = "grpc-retry-pushback-ms"  # when gRPC's own retries come back
NO_RETRY = "-1"
# A status travels in HTTP/2 headers, of which clients take 8 KiB: three copies, one of them with up
# to three bytes a byte.
MAX_MESSAGE_BYTES = 600

Read = Callable[[bytes], Message]
Sending = Callable[[grpc.ServicerContext, str, Iterator[Any]], Iterator[Any]]
Sent = Callable[[grpc.ServicerContext, str], None]

# The first class that matches counts; anything else is INTERNAL.
CODES: tuple[tuple[type[BaseException], grpc.StatusCode, str], ...] = (
    (DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (CancelledError, grpc.StatusCode.CANCELLED, "CANCELLED"),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    (DeadlineTooShortError, grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_TOO_SHORT"),
    (ShuttingDownError, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    (DeviceLostError, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    (UnsupportedTaskError, grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_TASK"),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION, "BAD_BUNDLE"),
    (NotReadyError, grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    (NotFoundError, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (UnimplementedError, grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED"),
    # Any other ValueError is a fault of ours.
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
)


class ToldError(Exception):
    """In place of an error that was counted and is in the log: what a client is told of it, which
    is its text. Keeps nothing of the request, as an error's traceback and its words may.

    known: as of _known; pushback: when the client's gRPC may try again, "" where it decides.
    """

    def __init__(
        self, status: status_pb2.Status, reason: str, known: dict[str, str], pushback: str
    ) -> None:
        super().__init__(status.message)
        self.status, self.reason, self.known, self.pushback = status, reason, known, pushback


class ErrorInterceptor(grpc.ServerInterceptor):
    """arrival: how requests are read; sending: as Intake.sending, how answers are sent;
    sent(context, method): hears of a call with one answer that no thread waits for, when that is
    about to be sent; on_error: hears the reason of each error; tracing: hears of calls that fail
    before a request of theirs has begun.

    All handlers become those of streams of requests (arrival.py). Of health and reflection, which
    have statuses of their own, only what goes wrong in reading is told here. `refusals` counts
    those for lack of room; whoever has the interceptor has them told.
    """

    def __init__(
        self,
        arrival: Arrival,
        sending: Sending,
        sent: Sent = lambda context, method: None,
        on_error: Callable[[str], None] = lambda reason: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._arrival, self._sending, self._sent = arrival, sending, sent
        self._on_error, self._tracing = on_error, tracing
        self.refusals = Refusals()

    def intercept_service(self, continuation: Callable, details: Any) -> Any:
        handler, method = continuation(details), details.method
        if handler is None:
            return self._unknown(method) if method.startswith(GUARDED) else None
        read = reader(handler.request_deserializer)
        codecs = (None, handler.response_serializer)  # requests come as bytes: wire.py
        if handler.request_streaming:
            behaviour = self._of_stream(handler.stream_stream, method, read)
        elif handler.response_streaming:
            behaviour = self._guard_stream(handler.unary_stream, method, read)
        elif method in GENERATING:
            behaviour = self._guard_stream(_sent(handler.unary_unary, self._sending), method, read)
        else:
            behaviour = self._guard(handler.unary_unary, method, read)
            return grpc.stream_unary_rpc_method_handler(behaviour, *codecs)
        return grpc.stream_stream_rpc_method_handler(behaviour, *codecs)

    def _unknown(self, method: str) -> Any:
        """For a method that our services do not have, of which gRPC itself would say less."""
        error = UnimplementedError(f"this server has no method {method[:MAX_METHOD]!r}")
        return refusal(self.abort, error, method)

    def _request(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, method: str, read: Read
    ) -> Any:
        try:
            return read(self._arrival.one(requests, context, method))
        except Exception as error:
            self.abort(error, method, context)

    def _guard(self, behaviour: Callable, method: str, read: Read) -> Callable:
        def guarded(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            request = self._request(requests, context, method, read)
            answer = None
            if not method.startswith(GUARDED):
                answer = behaviour(request, context)
            else:
                try:
                    answer = behaviour(request, context)
                except (Exception, DeviceLostError) as error:
                    self.abort(error, method, context, request)
            self._sent(context, method)
            return answer

        return guarded

    def _guard_stream(self, behaviour: Callable, method: str, read: Read) -> Callable:
        def guarded(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            if not method.startswith(GUARDED):  # it may last for ever: without the request here
                answers = behaviour(self._request(requests, context, method, read), context)
                yield from self._sending(context, method, answers)
                return
            request = self._request(requests, context, method, read)
            try:
                yield from behaviour(request, context)
            except (Exception, DeviceLostError) as error:
                self.abort(error, method, context, request)

        return guarded

    def _of_stream(self, behaviour: Callable, method: str, read: Read) -> Callable:
        """Streams of the Open Inference Protocol may be idle, and go on after a request that is
        none (Unreadable); those of reflection not.
        """

        def guarded(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                if method.startswith(GUARDED):
                    # Not a generator, which keeps the last one while it waits for the next.
                    found: Iterator[Any] = map(partial(_read_or_not, read), requests)
                    yield from behaviour(found, context)
                else:
                    found = map(read, self._arrival.all(requests, context, method))
                    yield from self._sending(context, method, behaviour(found, context))
            except (Exception, DeviceLostError) as error:
                self.abort(error, method, context)

        return guarded

    def abort(
        self,
        error: BaseException,
        method: str,
        context: grpc.ServicerContext,
        request: Any = None,
    ) -> NoReturn:
        """Ends a call with the status of `error`. request: what it asked for, if that is known."""
        told = error
        if not isinstance(told, ToldError):
            told = self._tell(error, method, context.peer(), _known(error, request))
        if self._tracing is not None:
            self._tracing.failed(told.reason, {"method": method} | told.known, context)
        status = rpc_status.to_status(told.status)
        if told.pushback:
            metadata = (*status.trailing_metadata, (PUSHBACK, told.pushback))
            status = status._replace(trailing_metadata=metadata)
        context.abort_with_status(status)
        raise AssertionError("abort_with_status raises")

    def told(self, error: Exception, request_id: str, peer: str) -> ToldError:
        """What is to be kept of the `error` of one request of a stream until its client hears."""
        [method] = STREAMS
        return self._tell(error, method, peer, _known(error, request_id=request_id))

    def _tell(
        self, error: BaseException, method: str, peer: str, known: dict[str, str]
    ) -> ToldError:
        """Counts it and has it in the log."""
        status, reason = self.status(error, method)
        _log(error, status, method, peer, known)
        pushback = ""
        if status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
            pushback = NO_RETRY
            if isinstance(error, QueueFullError):
                pushback = str(round(1000 * error.retry_seconds))
        return ToldError(status, reason, known, pushback)

    def status(self, error: BaseException, method: str) -> tuple[status_pb2.Status, str]:
        """What the client of `method` is told about `error`, and the reason in it."""
        matching = (entry[1:] for entry in CODES if isinstance(error, entry[0]))
        code, reason = next(matching, (grpc.StatusCode.INTERNAL, "INTERNAL"))
        if code is grpc.StatusCode.INTERNAL:
            incident = uuid.uuid4().hex[:8]
            message = f"internal error; the server's log has the details under {incident}"
        else:
            message = shortened(str(error))
        self._on_error(reason)
        self.refusals.count(reason, method)
        info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
        details: list[Message] = [info]
        if isinstance(error, UnsupportedTaskError):
            info.metadata["tasks"] = ",".join(task.name for task in error.tasks)
        if isinstance(error, QueueFullError):
            wait = Duration()
            wait.FromMilliseconds(round(1000 * error.retry_seconds))
            details.append(error_details_pb2.RetryInfo(retry_delay=wait))
        if isinstance(error, RequestError):
            field = error.field if isinstance(error, FieldError) else ""  # the request as a whole
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field=shortened(field), description=message)
            details.append(bad)
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return status, reason


def _known(error: BaseException, request: Any = None, request_id: str = "") -> dict[str, str]:
    """What may be told of a request, by name: nothing that it sent but names."""
    known = {
        "request_id": request_id or _id_of(request),
        "model": getattr(request, "model", ""),
        "field": error.field if isinstance(error, FieldError) else "",
        "problem": str(error) if isinstance(error, BundleError) else "",
    }
    return {name: shortened(value) for name, value in known.items() if value}


def _log(
    error: BaseException,
    status: status_pb2.Status,
    method: str,
    peer: str,
    known: dict[str, str],
) -> None:
    """Without what the client sent, which messages may quote, but for names and numbers."""
    if status.code == grpc.StatusCode.INTERNAL.value[0]:
        log.error("%s failed: %s", method, status.message, exc_info=error)
        return
    kind = type(error).__name__
    said = "".join(f", {name} {value!r}" for name, value in known.items())
    # While there is too much to do, telling of each refusal would be too much, too: refusals.py.
    level = logging.DEBUG if isinstance(error, QueueFullError) else logging.INFO
    told = fields(method=method, error_kind=kind, peer=peer, **known)
    log.log(level, "%s refused or stopped: %s%s", method, kind, said, extra=told)


def _id_of(request: Any) -> str:
    """What the client calls its request; of StreamImage it is inside, KServe has another name."""
    inner = getattr(request, "image", None)
    for message, name in ((request, "request_id"), (inner, "request_id"), (request, "id")):
        found = getattr(message, name, "")
        if isinstance(found, str) and found:
            return found
    return ""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a request of a stream whose bytes are no message, or one with too much in it."""

    error: RequestError


def _read_or_not(read: Read, data: bytes) -> Message | Unreadable:
    try:
        return read(data)
    except RequestError as error:
        return Unreadable(error)


def _sent(behaviour: Callable, sending: Sending) -> Callable:
    """A handler with one answer as one with a stream of them, which ends when that is sent.

    On the wire both are the same; but gRPC lets go of the former before its client has taken the
    answer, so that nobody would see who does not, nor how much waits for them.
    """

    def streamed(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        answer = behaviour(request, context)
        yield from sending(context, _id_of(answer), iter([answer]))

    return streamed


def shortened(text: str) -> str:
    """Of no more bytes than a client can be told."""
    data = text[: MAX_MESSAGE_BYTES + 1].encode(errors="replace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return text
    return data[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "..."
