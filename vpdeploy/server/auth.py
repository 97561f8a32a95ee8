"""The guard: who asks is found out before anything else is, for every request but those for health."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vpdeploy.server.access import Access, Grant
from vpdeploy.server.statuses import UnauthorizedError, error_response

_GRANT = "vpdeploy.grant"


class Guard:
    """ASGI middleware that lets requests pass only with a known token, and notes what it grants.

    Args:
        app: The app that answers requests with a known token.
        access: Tells what a token grants.
        open_paths: Paths that anybody may see.
    """

    def __init__(self, app: ASGIApp, *, access: Access, open_paths: frozenset[str]) -> None:
        self._app = app
        self._access = access
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            try:
                scope[_GRANT] = self._access.grant(given)
            except UnauthorizedError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def grant_of(request: Request) -> Grant:
    """Return what a request may do; the guard has let it pass."""
    grant: Grant = request.scope[_GRANT]
    return grant
