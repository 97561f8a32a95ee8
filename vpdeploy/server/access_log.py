"""The access log: one line for each HTTP request, with an id that the client also gets."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vpdeploy.server.logs import ACCESS_LOGGER
from vpdeploy.server.request_context import CURRENT_REQUEST, RequestContext, request_id_of, traceparent_of
from vpdeploy.server.tracing import Tracing
from vpdeploy.text import printable

_log = logging.getLogger(ACCESS_LOGGER)

_CLIENT_LEFT = 499
_LONGEST_PATH = 200


class RequestTrail:
    """ASGI middleware that gives each request its id, and writes down what became of it.

    The id is the client's ``X-Request-Id`` if it has the form of one, and answers carry it; a valid ``traceparent`` is
    passed through.

    Args:
        app: The app that answers the requests.
        access_log: Whether each request is logged.
        tracing: Where spans go; None for nowhere.
    """

    def __init__(self, app: ASGIApp, *, access_log: bool, tracing: Tracing | None = None) -> None:
        self._app = app
        self._access_log = access_log
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = RequestContext(
            request_id=request_id_of(headers.get("x-request-id")),
            traceparent=traceparent_of(headers.get("traceparent")),
        )
        span = None
        if self._tracing is not None:
            span = self._tracing.begin(context.traceparent, headers.get("tracestate"))
        started = time.perf_counter()
        status, sent_bytes = _CLIENT_LEFT, 0

        async def answer(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = context.request_id
                traceparent = span.traceparent if span is not None else context.traceparent
                if traceparent is not None:
                    answered["traceparent"] = traceparent
            elif message["type"] == "http.response.body":
                sent_bytes += len(message.get("body", b""))
            await send(message)

        token = CURRENT_REQUEST.set(context)
        try:
            await self._app(scope, receive, answer)
        finally:
            CURRENT_REQUEST.reset(token)
            if self._access_log:
                milliseconds = (time.perf_counter() - started) * 1000
                _write(scope, context, status=status, sent_bytes=sent_bytes, milliseconds=milliseconds)
            if span is not None:
                route = getattr(scope.get("route"), "path", None)
                span.end(
                    method=scope["method"],
                    route=route,
                    status=status,
                    times=context.times,
                    tasks=_tasks(scope, context),
                )


def _tasks(scope: Scope, context: RequestContext) -> list[str]:
    """Return the names of the tasks that were asked, also of one that does not exist."""
    if context.times is not None:
        return [task for task, _ in context.times.models]
    task = scope.get("path_params", {}).get("task")
    return [] if task is None else [str(task)]


def _write(scope: Scope, context: RequestContext, *, status: int, sent_bytes: int, milliseconds: float) -> None:
    client = scope.get("client")
    times = context.times
    # The query is left out: it may hold what is nobody's business.
    fields: dict[str, Any] = {
        "id": context.request_id,
        "client": client[0] if client else "",
        "method": printable(scope["method"], _LONGEST_PATH),
        "path": printable(scope["path"], _LONGEST_PATH),
        "task": printable(",".join(_tasks(scope, context)), _LONGEST_PATH) or None,
        "status": status,
        "bytes": sent_bytes,
        "ms": round(milliseconds, 3),
        "queue_ms": None if times is None else round(times.queue_s * 1000, 3),
        "traceparent": context.traceparent,
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    _log.info("%s", text, extra={"fields": fields})
