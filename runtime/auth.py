"""Lets calls pass that have a token for what they do; health checks pass always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from .errors import ForbiddenError, UnauthenticatedError
from .lanes import ADMIN, refusal
from .tokens import Tokens

OPEN = ("/grpc.health.v1.Health/",)  # probes of orchestrators have no token


def scope_of(method: str) -> str | None:
    """What a call of /package.Service/Method needs; None for nothing."""
    if method.startswith(OPEN):
        return None
    return "admin" if method.startswith(ADMIN) else "infer"


class AuthInterceptor(grpc.ServerInterceptor):
    """refuse(error, context): ends a call with the error's status."""

    def __init__(
        self, tokens: Tokens, refuse: Callable[[Exception, grpc.ServicerContext], Any]
    ) -> None:
        self._tokens, self._refuse = tokens, refuse

    def intercept_service(self, continuation: Callable, details: Any) -> Any:
        scope = scope_of(details.method)
        if scope is None:
            return continuation(details)
        try:
            self._tokens.check(details.invocation_metadata, scope)
        except (UnauthenticatedError, ForbiddenError) as error:
            return refusal(self._refuse, error)
        return continuation(details)
