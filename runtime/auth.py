"""Lets calls pass that have a token for what they do; health checks pass always.

Where there are no tokens, models are loaded and unloaded by programs of this machine alone. The log
says who did so, and who was refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import grpc

from .errors import ForbiddenError, UnauthenticatedError
from .lanes import ADMIN, MAX_METHOD, Refuse, refusal
from .logs import fields
from .tokens import SCOPES, Tokens

log = logging.getLogger("nuwa.runtime")

# Probes of orchestrators have no token. ModelReady, which tells what models there are, needs one.
OPEN = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
NO_TOKENS = (
    "to load and unload models over the network needs a token of the scope admin, and this server "
    "has no tokens (its setting 'tokens'); SIGHUP has it load again what has changed"
)


def scope_of(method: str) -> str | None:
    """What a call of /package.Service/Method needs; None for nothing."""
    if method.startswith(OPEN):
        return None
    return "admin" if method.startswith(ADMIN) else "infer"


class AuthInterceptor(grpc.ServerInterceptor):
    """tokens: None where none are needed; then local says whether only this machine can connect."""

    def __init__(
        self,
        tokens: Tokens | None,
        refuse: Refuse,
        *,
        local: bool = False,
    ) -> None:
        self._tokens, self._refuse, self._local = tokens, refuse, local

    def intercept_service(self, continuation: Callable, details: Any) -> Any:
        scope, method = scope_of(details.method), details.method[:MAX_METHOD]
        if scope is None:
            return continuation(details)
        name = ""
        if self._tokens is not None:
            try:
                name = self._tokens.check(details.invocation_metadata, scope).name
            except (UnauthenticatedError, ForbiddenError) as error:
                return self._refusal(error, method, self._name_of(details.invocation_metadata))
        elif scope == "admin" and not self._local:
            return self._refusal(ForbiddenError(NO_TOKENS), method, "")
        handler = continuation(details)
        return _noted(handler, method, name) if scope == "admin" and handler else handler

    def _refusal(self, error: Exception, method: str, name: str) -> Any:
        def refuse(error: Exception, method: str, context: grpc.ServicerContext) -> None:
            _tell(f"was refused ({error})", method, name, context)
            self._refuse(error, method, context)

        return refusal(refuse, error, method)

    def _name_of(self, metadata: Any) -> str:
        """Of the token, whatever it is for; "" where there is no good one."""
        assert self._tokens is not None
        for scope in SCOPES:
            try:
                return self._tokens.check(metadata, scope).name
            except (UnauthenticatedError, ForbiddenError):
                pass
        return ""


def _tell(what: str, method: str, name: str, context: grpc.ServicerContext) -> None:
    peer = context.peer()
    said = {"method": method, "peer": peer} | ({"token": name} if name else {})
    who = f"{name!r} at {peer}" if name else peer
    log.info("%s of %s %s", method, who, what, extra=fields(**said))


def _noted(handler: Any, method: str, name: str) -> Any:
    """The same handler, whose calls are in the log."""

    def noting(behaviour: Callable) -> Callable:
        @functools.wraps(behaviour)  # with its attributes, of which one is the lane's threads
        def noted(requests: Any, context: grpc.ServicerContext) -> Any:
            _tell("is let in", method, name, context)
            return behaviour(requests, context)

        return noted

    codecs = handler.request_deserializer, handler.response_serializer
    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(noting(handler.stream_stream), *codecs)
    return grpc.stream_unary_rpc_method_handler(noting(handler.stream_unary), *codecs)
