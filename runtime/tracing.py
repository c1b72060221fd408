"""Traces of requests for OpenTelemetry, sent over OTLP; needs the extra `tracing`.

A request is a span that continues the client's trace (W3C `traceparent` in the metadata), with a
child for its time in the queue and one for its generation. A call that fails before that, or gets
an answer that was kept, is one span.
"""

from __future__ import annotations

import logging
import time
from typing import Any
from weakref import WeakSet

import grpc

from .core import Accepted, Done, Event, Frame
from .errors import UnavailableError
from .metrics import OK, outcome_of

log = logging.getLogger("nuwa.runtime")

PHASES = ("queue", "encode", "decode", "prefill", "pixels", "ranking")
EXPORT_SECONDS = 2  # for a collector that is away


class Tracing:
    """endpoint: http://HOST:PORT of a collector; https for TLS. UnavailableError without the extra.

    exporter: instead, where spans go.
    """

    def __init__(self, endpoint: str, version: str, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"traces need {error.name}; install it with: pip install 'nuwa-runtime[tracing]'"
            ) from error
        if not log.isEnabledFor(logging.DEBUG):
            # Which tells of headers that are no traces by quoting what the client sent.
            logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        resource = Resource.create({"service.name": "nuwa", "service.version": version})
        self._trace, self._propagator = trace, TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=resource)
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nuwa.runtime", version)
        self._begun: WeakSet[grpc.ServicerContext] = WeakSet()  # calls with a request that began

    def begin(
        self, name: str, attributes: dict[str, Any], context: grpc.ServicerContext
    ) -> RequestSpan:
        """A request of a call, which begins now. attributes: without the `nuwa.` before each."""
        self._begun.add(context)
        span = self._span(name, attributes, context)
        return RequestSpan(self._trace, self._tracer, span)

    def answered(
        self,
        name: str,
        attributes: dict[str, Any],
        context: grpc.ServicerContext,
        seconds: float,
    ) -> None:
        """A call that is answered now, after `seconds`, and for which nothing was generated."""
        came = time.time_ns() - round(1e9 * seconds)
        self._span(name, attributes, context, came).end()

    def failed(
        self, reason: str, attributes: dict[str, Any], context: grpc.ServicerContext
    ) -> None:
        """A call that ends by an error. Nothing if a request of it began: its span tells that."""
        if context in self._begun:
            return
        span = self._span("call", {"reason": reason} | attributes, context)
        span.set_status(self._trace.StatusCode.ERROR, reason)
        span.end()

    def _span(
        self,
        name: str,
        attributes: dict[str, Any],
        context: grpc.ServicerContext,
        start_time: int | None = None,
    ) -> Any:
        metadata = context.invocation_metadata()
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        return self._tracer.start_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={f"nuwa.{key}": value for key, value in attributes.items()},
            start_time=start_time,
        )

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


class RequestSpan:
    """Follows one request, as metrics.Meter does."""

    def __init__(self, trace: Any, tracer: Any, span: Any) -> None:
        self._trace, self._tracer, self._span = trace, tracer, span
        self._child = self._begin("queue")
        self._accepted = self._framed = self._ended = False

    def heard(self, event: Event) -> None:
        """An event of it, in order; Done ends it well."""
        if isinstance(event, Accepted) and not self._accepted:
            self._accepted = True
            self._child.end()
            self._child = self._begin("generate")
        elif isinstance(event, Frame) and not self._framed:
            self._framed = True
            self._span.add_event("first frame")
        elif isinstance(event, Done):
            for name in PHASES:
                seconds = getattr(event.timings, name)
                self._span.set_attribute(f"nuwa.{name}_seconds", seconds)
            self._span.set_attribute("nuwa.steps", event.timings.steps)
            self._end(OK)

    def failed(self, error: BaseException) -> None:
        """It ended by this error."""
        if not self._ended:
            outcome = outcome_of(error)
            self._span.set_status(self._trace.StatusCode.ERROR, outcome)
            self._end(outcome)

    def _begin(self, name: str) -> Any:
        context = self._trace.set_span_in_context(self._span)
        return self._tracer.start_span(name, context=context)

    def _end(self, outcome: str) -> None:
        self._ended = True
        self._child.end()
        self._span.set_attribute("nuwa.outcome", outcome)
        self._span.end()
