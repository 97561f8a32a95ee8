"""The names that the server answers to: against web pages that give this machine a name of theirs (DNS rebinding)."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from vpdeploy.server.statuses import MisdirectedError, error_response
from vpdeploy.text import cut_name

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""What a server that only this machine can reach is called."""


class HostCheck:
    """ASGI middleware that refuses requests to a host of another name, whatever their port.

    Args:
        app: The app behind.
        allowed: Host names; ``*.NAME`` stands for every name below, ``*`` for all.
        open_paths: Paths that may be asked for by any name, as probes by address do.
    """

    def __init__(self, app: ASGIApp, *, allowed: Collection[str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in allowed)
        self._suffixes = tuple(name[1:] for name in self._names if name.startswith("*."))
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and "*" not in self._names and scope["path"] not in self._open_paths:
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if not hosts or not all(map(self._allows, hosts)):
                named = f"'{cut_name(hosts[0])}'" if hosts else "no host"
                response = error_response(
                    MisdirectedError(f"the request names {named}, which this server is not called; see --allowed-host")
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        name = host_name(host)
        return name in self._names or (name.endswith(self._suffixes) if self._suffixes else False)


def host_name(host: str) -> str:
    """Return the name in a ``Host`` header, without its port, in lower case; an IPv6 address keeps its brackets."""
    name, colon, port = host.rpartition(":")
    return (name if colon and (not port or port.isdecimal()) and "]" not in port else host).lower()
