"""The bearer token, asked of every request but those for health."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from vpdeploy.server.statuses import UnauthorizedError, error_response


class BearerToken:
    """ASGI middleware that lets requests pass only with the right token.

    Args:
        app: The app that answers requests with the right token.
        token: The token that a request must carry.
        open_paths: Paths that anybody may see.
    """

    def __init__(self, app: ASGIApp, *, token: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, token = given.partition(b" ")
            # The scheme's case is free (RFC 9110, 11.1).
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token, self._token):
                response = error_response(UnauthorizedError("send the header 'Authorization: Bearer TOKEN'"))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
