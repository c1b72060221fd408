"""Errors that say more than the plain ones of core.py, for the service and the scheduler.

Knows neither gRPC nor status codes; interceptor.py turns these into both.
"""

from __future__ import annotations

from .core import CancelledError


class RequestError(ValueError):
    """What was asked for is wrong, and who asked can mend it: the message says how."""


class FieldError(RequestError):
    """A value given by the user is wrong; `field` is the request field's path, as in "mask.boxes".

    Paths are those of proto/nuwa/v1/generation.proto.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnauthenticatedError(Exception):
    """The call does not say who makes it, or not so that it can be believed."""


class ForbiddenError(Exception):
    """Who makes the call may not do that."""


class NotFoundError(ValueError):
    """A name that the server does not have; the message says which it has."""


class UnimplementedError(Exception):
    """There is no such method."""


class NotReadyError(Exception):
    """There is nothing yet that could take the request; there may be soon."""


class DeadlineExceededError(CancelledError):
    """The request's deadline passed before it was finished."""


class DeadlineTooShortError(Exception):
    """The deadline would pass before the request could be finished; nothing was begun."""


class ShuttingDownError(Exception):
    """The scheduler is closed, or closed before this request was finished."""


class UnavailableError(Exception):
    """This machine lacks what was asked for by name; the message says what and why."""


class EngineError(RuntimeError):
    """The engine failed at work it had accepted: never the user's fault. See `__cause__`."""


class DeviceLostError(BaseException):
    """The device can run nothing more in this process, which has to end and be started again.

    Not an Exception, so that whoever ends one request for its failure does not take it for one.
    """
