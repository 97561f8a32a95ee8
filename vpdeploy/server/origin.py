"""Requests that pages of other sites make a browser send: none of them may change or cost anything here."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from vpdeploy.server.statuses import ForbiddenError, error_response

_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


class SameOrigin:
    """ASGI middleware that refuses what a page of another origin sends with anything but GET, HEAD or OPTIONS.

    Browsers say where a request comes from: all of today's in ``Sec-Fetch-Site``, older ones in ``Origin``. Programs
    say neither and pass. So does whoever sends a token: a browser adds no ``Authorization: Bearer`` by itself, and a
    page of another origin may add one only after a preflight, which this server answers for nobody.

    Args:
        app: The app that answers all other requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] not in _SAFE_METHODS and _is_foreign(scope["headers"]):
            error = ForbiddenError(
                "a page of another site may not send this; open this server's own page, or use a token"
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_foreign(headers: list[tuple[bytes, bytes]]) -> bool:
    site = origin = host = None
    for name, value in headers:
        if name == b"authorization":
            return False
        if name == b"sec-fetch-site":
            site = value
        elif name == b"origin":
            origin = value
        elif name == b"host":
            host = value
    if site is not None:
        return site not in (b"same-origin", b"none")
    return origin is not None and (host is None or _authority(origin) != host.lower())


def _authority(origin: bytes) -> bytes:
    """Return host and port of an origin; nothing for ``null`` and what is no origin."""
    try:
        return urlsplit(origin.decode("latin-1").lower()).netloc.encode("latin-1")
    except ValueError:
        return b""
