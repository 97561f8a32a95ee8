"""Redirects that name no host: the framework copies the client's Host header into them."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RelativeRedirects:
    """ASGI middleware that cuts scheme and host off every Location.

    Args:
        app: The app whose redirects lead to itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_relative(message: Message) -> None:
            if message["type"] == "http.response.start" and 300 <= message["status"] < 400:
                headers = [
                    (name, _relative(value) if name == b"location" else value) for name, value in message["headers"]
                ]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_relative)


def _relative(location: bytes) -> bytes:
    parts = urlsplit(location.decode("latin-1"))
    # One slash: with two, a path would name a host again.
    return urlunsplit(("", "", "/" + parts.path.lstrip("/"), parts.query, "")).encode("latin-1")
