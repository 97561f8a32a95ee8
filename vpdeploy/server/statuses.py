"""How errors become HTTP responses: the one table of statuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import Response

from vpdeploy.errors import (
    BackendError,
    DeadlineExceededError,
    InputError,
    LayoutMismatchError,
    MissingExtraError,
    ParityError,
    QueueFullError,
    ShuttingDownError,
    SpecError,
    StorageFullError,
    TaskNotFoundError,
    VersionConflictError,
    VpdeployError,
)

_log = logging.getLogger(__name__)


class TooLargeError(InputError):
    """A request is larger than the server accepts."""


class UnauthorizedError(VpdeployError):
    """The bearer token is missing or wrong."""


class ForbiddenError(VpdeployError):
    """The bearer token is known, and not good for this; or no token would help."""


class MisdirectedError(VpdeployError):
    """The request was meant for a server of another name."""


class ClientGoneError(VpdeployError):
    """The client closed the connection before its answer was ready."""


STATUSES: dict[type[VpdeployError], int] = {
    TooLargeError: 413,
    InputError: 400,
    SpecError: 400,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    TaskNotFoundError: 404,
    LayoutMismatchError: 409,
    VersionConflictError: 412,
    MisdirectedError: 421,
    QueueFullError: 429,
    ClientGoneError: 499,
    ParityError: 422,
    BackendError: 500,
    MissingExtraError: 501,
    ShuttingDownError: 503,
    DeadlineExceededError: 504,
    StorageFullError: 507,
}
"""The status of each error class; the nearest base class in the table counts."""

_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error; 500 for one that is in no table."""
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return 500


def describe_error(error: Exception) -> tuple[int, str]:
    """Return an error's HTTP status, by which every protocol finds its own, and what a client is told.

    What no client should see goes to the log instead.
    """
    status = status_of(error)
    if isinstance(error, VpdeployError):
        message = " ".join(str(error).split())
        if status >= 500 and not isinstance(error, (ShuttingDownError, DeadlineExceededError)):
            _log.error("request failed: %s", message)
    else:
        message = "internal error; the server's log says more"
        _log.error("request failed unexpectedly", exc_info=error)
    return status, message


def error_response(error: Exception) -> Response:
    """Return an error as ``{"error": "..."}``."""
    if isinstance(error, HTTPException):  # what the framework refuses: unknown paths, wrong methods, broken forms
        return refusal(error.status_code, str(error.detail), headers=error.headers)
    status, message = describe_error(error)
    return refusal(status, message, headers=_HEADERS.get(status))


def refusal(status: int, message: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with the given status and an ``error`` message."""
    body = json.dumps({"error": message}).encode()
    return Response(body, status_code=status, headers=headers, media_type="application/json")
