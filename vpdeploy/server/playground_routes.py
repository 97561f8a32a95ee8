"""The page at ``/``: its files, and what it draws live."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope as AsgiScope

from vpdeploy.errors import InputError
from vpdeploy.server.access import Scope
from vpdeploy.server.auth import grant_of
from vpdeploy.server.service import Service
from vpdeploy.server.statuses import ForbiddenError

_FOLDER = resources.files("vpdeploy.server") / "playground"
_INDEX = "index.html"
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_MAX_SECOND_DIGITS = 12

# The page runs its own files and nothing else: no inline script or style, no other host, no frame around it, and no
# text that becomes markup.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def _read_files() -> dict[str, _File]:
    """Return the page's files by path."""
    files = {}
    for each in _FOLDER.iterdir():
        media_type = _MEDIA_TYPES.get(each.name.rpartition(".")[2])
        if media_type is not None:
            content = each.read_bytes()
            path = "/" if each.name == _INDEX else f"/playground/{each.name}"
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path] = _File(content=content, media_type=media_type, etag=etag)
    return files


_FILES = _read_files()

PLAYGROUND_PATHS = frozenset(_FILES)
"""Paths of the page's files. They are the same for everybody and tell nothing of the tasks: no token guards them."""


def add_playground_routes(app: FastAPI, service: Service) -> None:
    """Add the page and what it draws live to an app."""
    server = secrets.token_hex(8)

    async def file(request: Request) -> Response:
        if service.access.is_open and not _is_local(request.scope):
            raise ForbiddenError(
                "without a token the playground opens on the server's own machine only; start the server with "
                "VPDEPLOY_TOKEN, and the page asks for it"
            )
        found = _FILES[request.scope["path"]]
        headers = {**_HEADERS, "ETag": found.etag}
        if _matches(request.headers.get("if-none-match", ""), found.etag):
            return Response(status_code=304, headers=headers)
        return Response(found.content, headers=headers, media_type=found.media_type)

    async def activity(request: Request) -> Response:
        grant_of(request).require(Scope.METRICS)
        seconds = service.activity.seconds(since=_since(request))
        return JSONResponse(
            {
                "server": server,
                "ready": service.is_ready,
                "second": service.activity.second,
                "queue_images": service.batcher.queue_length,
                "limits": _limits(service),
                "seconds": seconds,
            },
            headers={"Cache-Control": "no-store"},
        )

    for path in _FILES:
        app.add_api_route(path, file, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    app.add_api_route(
        "/v1/activity",
        activity,
        response_model=None,
        summary="Show the queue and the batches of the last seconds",
        openapi_extra={
            "parameters": [
                {
                    "name": "since",
                    "in": "query",
                    "description": "The first second of interest, counted from the server's start.",
                    "schema": {"type": "integer", "minimum": 0, "maximum": 10**_MAX_SECOND_DIGITS - 1, "default": 0},
                }
            ]
        },
    )


def _limits(service: Service) -> dict[str, Any]:
    settings = service.settings
    return {
        "max_batch_size": settings.batching.max_batch_size,
        "max_queue_size": settings.batching.max_queue_size,
        "max_body_bytes": settings.max_body_bytes,
        "max_images": settings.max_images,
    }


def _is_local(scope: AsgiScope) -> bool:
    """Tell whether a connection came over the loopback address: of the server's end, which nobody can make up."""
    address = scope.get("server")
    if address is None or address[1] is None:  # a Unix socket
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


def _matches(condition: str, etag: str) -> bool:
    """Tell whether a client has the file already (RFC 9110, 13.1.2)."""
    known = [each.strip().removeprefix("W/") for each in condition.split(",")]
    return etag in known or known == ["*"]


def _since(request: Request) -> int:
    text = request.query_params.get("since", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_SECOND_DIGITS):
        raise InputError(f"since should be a whole number of seconds, found '{text[:40]}'")
    return int(text)
