"""What is known of the request that is being served, wherever its work happens."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

from vpdeploy.server.statistics import RequestTimes

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}")

# W3C Trace Context, level 1: a later version may say more behind the flags, after another dash.
_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-[!-~]{0,64})?"
)


@dataclass(kw_only=True)
class RequestContext:
    """One request.

    Attributes:
        request_id: Its id: the client's own, or one that was made here.
        traceparent: Where it stands in a trace, as the client sent it; None where it sent nothing of that form.
        times: Its moments in the service; None before it gets there.
    """

    request_id: str
    traceparent: str | None = None
    times: RequestTimes | None = None


CURRENT_REQUEST: ContextVar[RequestContext | None] = ContextVar("vpdeploy_request", default=None)
"""The request that the running task works for: protocols set it, and the service notes the moments there."""


def request_id_of(given: str | None) -> str:
    """Return a client's own request id, or a new one where there is none or it is not of a harmless form.

    The form is that of the usual ids: up to 128 letters, digits and ``._:@/+=-``.
    """
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(16)


def traceparent_of(given: str | None) -> str | None:
    """Return a ``traceparent`` header if it is valid (W3C Trace Context), else None."""
    found = _TRACEPARENT.fullmatch(given or "")
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return None
    return found.group()
