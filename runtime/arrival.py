"""How a call's request comes in: refused before it is read where there is no room for it.

gRPC's own way of reading a request waits for it in one of the server's threads, for as long as the
client likes. On the wire a call with one request is like one with a stream of them; so the server
takes all calls as streams, and reads the first message itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from .core import CancelledError
from .errors import FieldError
from .lanes import GENERATING, KSERVE, PROBES, REFLECTION
from .patience import Patience

PROBE_SECONDS = 1.0  # in which the request of a probe has to come, which is a few bytes
# Methods whose requests name something at most. Many need no token, and their calls may stay open
# for ever, with what they were asked.
SMALL = (*PROBES, *REFLECTION, "/grpc.health.v1.Health/", f"{KSERVE}Server")
SMALL_BYTES = 1024


class Arrival:
    """seconds: in which a request has to come; crowded(context, method): QueueFullError if one
    more of this client could not be taken, whatever it asks for.
    """

    def __init__(
        self,
        patience: Patience,
        seconds: float,
        crowded: Callable[[grpc.ServicerContext, str], None],
    ) -> None:
        self._patience, self._seconds, self._crowded = patience, seconds, crowded

    def one(self, requests: Iterator[Any], context: grpc.ServicerContext, method: str) -> Any:
        """The request of a call that has one. FieldError, of no field, if there is none, or if it
        is too large for its method.
        """
        if method in GENERATING:
            self._crowded(context, method)
        found = self._next(requests, context, method)
        if found is None:
            raise FieldError("", "the call has no request")
        return found

    def all(
        self, requests: Iterator[Any], context: grpc.ServicerContext, method: str
    ) -> Iterator[Any]:
        """Those of a stream that may not be idle. FieldError as `one`, for what is too large."""
        while (request := self._next(requests, context, method)) is not None:
            yield request

    def _next(self, requests: Iterator[Any], context: grpc.ServicerContext, method: str) -> Any:
        seconds = min(self._seconds, PROBE_SECONDS) if method in PROBES else self._seconds
        what = f"{method} sent no request"
        with self._patience.waiting(context, what, seconds, for_request=True):
            try:
                found = next(requests, None)
            except grpc.RpcError:  # how the iterator says that the call is over
                raise CancelledError("the client left") from None
        if found is None and not context.is_active():  # as where the request is too large
            raise CancelledError("the client left")
        if found is not None and len(found) > SMALL_BYTES and method.startswith(SMALL):
            raise FieldError(
                "",
                f"the request has {len(found)} bytes; those of {method} have at most {SMALL_BYTES}",
            )
        return found
