"""Running an app: a listening socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from vpdeploy.errors import SpecError
from vpdeploy.server.protocol import LimitedProtocol
from vpdeploy.server.service import Service
from vpdeploy.server.settings import DRAIN_S, ServerSettings
from vpdeploy.server.tls import Certificate

if TYPE_CHECKING:  # an extra of its own
    from vpdeploy.server.grpc_server import GrpcServer

_log = logging.getLogger(__name__)

_STARTUP_FAILED = 3
"""The exit code that uvicorn gives an app that does not start."""

_TICKS_PER_CHECK = 10

_SWITCH_S = 0.001
"""How long a thread may keep the interpreter while the event loop waits, in s; Python's default is 5 ms."""

_MAX_DIGITS = 640
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
"""Numbers of glibc's malloc.h."""


def bind_socket(host: str, port: int) -> socket.socket:
    """Reserve an address, without listening yet; port 0 picks a free one.

    Raises:
        SpecError: The address is unknown, in use or not ours to use.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return a socket's address as the authority of a URL, ``HOST:PORT``."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which says when it listens and ends readiness as soon as it is told to stop.

    Args:
        app: The app, made by ``create_app``.
        on_listening: Called once connections are accepted.
    """

    def __init__(self, app: FastAPI, *, on_listening: Callable[[], None]) -> None:
        settings: ServerSettings = app.state.service.settings
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=DRAIN_S,
        )
        super().__init__(config)
        self._settings = settings
        self._certificate = None if settings.certfile is None else Certificate(settings.certfile, settings.keyfile)
        self._service: Service = app.state.service
        self._grpc_server: GrpcServer | None = app.state.grpc_server
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections; unlike uvicorn's, with limits, on how long a TLS handshake may take, too."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(_STARTUP_FAILED)
        tls: dict[str, Any] = {}
        if self._certificate is not None:
            tls = {"ssl": self._certificate.context, "ssl_handshake_timeout": self._settings.header_timeout_s}
        loop, backlog = asyncio.get_running_loop(), self.config.backlog
        self.servers = [
            await loop.create_server(self._connection, sock=listener, backlog=backlog, **tls)
            for listener in sockets or []
        ]
        self.started = True
        self._on_listening()

    def _connection(self) -> LimitedProtocol:
        """Return the protocol of one connection."""
        return LimitedProtocol(
            settings=self._settings, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        """Look after connections and certificate once a second; uvicorn calls this ten times as often."""
        if counter % _TICKS_PER_CHECK == 0:
            if self._certificate is not None:
                self._certificate.refresh()
            for connection in list(self.server_state.connections):
                if isinstance(connection, LimitedProtocol):
                    connection.check()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no longer, in any protocol, and answer what was accepted."""
        if self._grpc_server is not None:
            self._grpc_server.stop(DRAIN_S)
        await super().shutdown(sockets)

    def stop(self) -> None:
        """Accept no more connections, answer what was accepted, and return from ``run``."""
        self._service.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in answer to a signal."""
        self._service.draining = True
        super().handle_exit(sig, frame)


def _bound_the_interpreter() -> None:
    """Have large memory returned as soon as it is free, and JSON's longest numbers refused rather than computed."""
    sys.set_int_max_str_digits(_MAX_DIGITS)
    sys.setswitchinterval(_SWITCH_S)
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            return  # not glibc
        # By default glibc keeps blocks of up to 32 MiB, in as many arenas as eight a core.
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_ARENA_MAX, 4)


def run_server(app: FastAPI, listener: socket.socket, *, on_listening: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; everything that was accepted by then is answered first.

    Args:
        app: The app, made by ``create_app``.
        listener: The socket, made by ``bind_socket``; it is closed at the end.
        on_listening: Called once connections are accepted.
    """
    server = Server(app, on_listening=on_listening)
    _bound_the_interpreter()
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal once more when it is done; by then there is nothing left to stop.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    _log.info("stopped, every accepted request was answered")
