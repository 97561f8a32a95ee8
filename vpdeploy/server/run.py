"""Running an app: a listening socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from vpdeploy.errors import SpecError
from vpdeploy.server.app import CLOSE_S
from vpdeploy.server.protocol import LimitedProtocol
from vpdeploy.server.service import Service
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.systemd import Notifier
from vpdeploy.server.tls import Certificate
from vpdeploy.server.watchdog import LastResort, end_process

if TYPE_CHECKING:  # an extra of its own
    from vpdeploy.server.grpc_server import GrpcServer

_log = logging.getLogger(__name__)

_SAME_SIGNAL_S = 0.5
"""Signals so close together are one: timeout(1), for one, sends it to the process and then to its whole group."""

_DRAIN_LOOK_S = 0.1

_REFUSE_S = 2.0
"""After a fault, how long clients may take to hear that they are refused."""

_HANG_UP_S = 1.0
"""How long handlers may take to end once their clients were hung up on, and again once they were cancelled."""

_CLOSING_S = 2 * _HANG_UP_S + CLOSE_S + 2.0
"""How long the end may take behind the last request, before the process is ended."""

_STARTUP_FAILED = 3
"""The exit code that uvicorn gives an app that does not start."""

_TICKS_PER_CHECK = 10

_SWITCH_S = 0.0001
"""How long a thread may keep the interpreter while the event loop waits, in s; Python's default is 5 ms.

The loop gives the interpreter away at each system call, and waits this long to have it back while threads parse large
bodies.
"""

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
    """uvicorn, which says when it listens, and stops in steps of which none takes for ever.

    Told to stop, it is not ready any more, but goes on accepting for ``lame_duck_s``; then it listens no longer and
    answers what it accepted for up to ``drain_s``; then it hangs up. Each further signal ends the step that it is in.

    Args:
        app: The app, made by ``create_app``.
        on_listening: Called once connections are accepted.
        last_resort: Ends the process where even that does not end; None leaves it to the caller.

    Attributes:
        unanswered: How many requests that were accepted were not answered.
    """

    def __init__(
        self, app: FastAPI, *, on_listening: Callable[[], None], last_resort: LastResort | None = None
    ) -> None:
        settings: ServerSettings = app.state.service.settings
        config = uvicorn.Config(
            self._serve_request,
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            # Whoever connects from this machine could choose its address by a header, and with it another share.
            proxy_headers=False,
            ws="none",
        )
        super().__init__(config)
        self._settings = settings
        self._certificate = None if settings.certfile is None else Certificate(settings.certfile, settings.keyfile)
        self.unanswered = 0
        self._app = app
        self._service: Service = app.state.service
        self._grpc_server: GrpcServer | None = app.state.grpc_server
        self._service.on_fault = self._give_up
        self._on_listening = on_listening
        self._last_resort = last_resort
        self._signalled_at: float | None = None
        self._listens_until = math.inf
        self._drains_until = math.inf
        self._notifier = Notifier()

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
        self._notifier.ready(f"serving {len(self._service.session.tasks)} tasks")

    def _connection(self) -> LimitedProtocol:
        """Return the protocol of one connection."""
        return LimitedProtocol(
            settings=self._settings,
            is_draining=lambda: self._service.draining,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

    async def on_tick(self, counter: int) -> bool:
        """Look after connections and certificate once a second; uvicorn calls this ten times as often."""
        if self._service.watchdog.fault is None:  # from here: what hangs on the event loop must not go unnoticed
            self._notifier.beat()
        if self._service.draining:
            self._notifier.stopping()
        if counter % _TICKS_PER_CHECK == 0:
            if self._certificate is not None:
                self._certificate.refresh()
            self._check_connections()
        return await super().on_tick(counter) or time.monotonic() >= self._listens_until

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no longer, in any protocol, wait for what was accepted, hang up on the rest, and end the app."""
        self._service.draining = True
        self._notifier.stopping()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self._drains_until = min(self._drains_until, time.monotonic() + self._settings.drain_s)
        if self._grpc_server is not None:
            self._grpc_server.stop(max(0.0, self._drains_until - time.monotonic()))
        while self._is_occupied and time.monotonic() < self._drains_until:
            await asyncio.sleep(_DRAIN_LOOK_S)
            self.unanswered += self._check_connections()
        self.unanswered += sum(each.owes_answer for each in self._connections())
        if self._grpc_server is not None:
            self.unanswered += self._grpc_server.calls
            self._grpc_server.stop(0)
        await self._hang_up()
        await self.lifespan.shutdown()

    def stop(self) -> None:
        """Accept no more connections, answer what was accepted, and return from ``run``; any thread may call it."""
        self._service.draining = True
        self._listens_until = 0.0

    def stop_step(self) -> None:
        """End readiness, or the step of stopping that it is in, as a signal does."""
        settings, now = self._settings, time.monotonic()
        if self._listens_until == math.inf:
            self._service.draining = True
            self._listens_until = now + settings.lame_duck_s
            self._end_within(settings.lame_duck_s + settings.drain_s + _CLOSING_S)
        elif now < self._listens_until:
            self._listens_until = now
            self._end_within(settings.drain_s + _CLOSING_S)
        else:
            self._drains_until = now
            self._end_within(_CLOSING_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in answer to a signal; several within half a second are one."""
        now = time.monotonic()
        if self._signalled_at is None or now - self._signalled_at >= _SAME_SIGNAL_S:
            self._signalled_at = now
            self.stop_step()

    def _give_up(self) -> None:
        """Stop where nothing can be answered any more; there is time to say so."""
        self._drains_until = time.monotonic() + _REFUSE_S
        self.stop()
        self._end_within(_REFUSE_S + _CLOSING_S)

    def _end_within(self, seconds: float) -> None:
        if self._last_resort is not None:
            self._last_resort.end_within(seconds)

    @property
    def _is_occupied(self) -> bool:
        calls = 0 if self._grpc_server is None else self._grpc_server.calls
        return bool(self.server_state.connections or self.server_state.tasks or calls)

    def _check_connections(self) -> int:
        """Hang up on clients that stall; returns on how many that have not taken their answers."""
        return sum(not each.check() for each in self._connections())

    def _connections(self) -> list[LimitedProtocol]:
        return [each for each in self.server_state.connections if isinstance(each, LimitedProtocol)]

    async def _hang_up(self) -> None:
        """Tell handlers that their clients have gone, and cancel those that do not listen."""
        for connection in self._connections():
            connection.hang_up()
        for is_told in (True, False):
            for task in () if is_told else self.server_state.tasks:
                task.cancel()
            until = time.monotonic() + _HANG_UP_S
            while self._is_occupied and time.monotonic() < until:
                await asyncio.sleep(_HANG_UP_S / 100)

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app; a request that was cancelled at the end has been counted and needs no traceback."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if time.monotonic() < self._drains_until:
                raise


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


def run_server(app: FastAPI, listener: socket.socket, *, on_listening: Callable[[], None]) -> bool:
    """Serve until SIGTERM or SIGINT; everything that was accepted by then is answered first.

    Where something hangs so that it cannot be closed, the process ends here, with exit code 1.

    Args:
        app: The app, made by ``create_app``.
        listener: The socket, made by ``bind_socket``; it is closed at the end.
        on_listening: Called once connections are accepted.

    Returns:
        Whether the server stopped because it was told to; otherwise it could not answer any more.
    """
    service: Service = app.state.service
    server = Server(app, on_listening=on_listening, last_resort=LastResort())
    _bound_the_interpreter()
    if threading.current_thread() is threading.main_thread():
        # uvicorn has them handled so itself while it runs; a signal just before or after it is not lost, nor raises.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])
    fault = service.watchdog.fault
    if not service.is_closed:
        end_process(f"ended without waiting for what hangs{_words(server.unanswered)}")
    if fault is None and not server.unanswered:
        _log.info("stopped, every accepted request was answered")
    else:
        _log.warning("stopped%s%s", " after a fault" if fault else "", _words(server.unanswered))
    return fault is None


def _words(unanswered: int) -> str:
    if not unanswered:
        return ""
    return f"; requests that were accepted and not answered, because they or their clients took too long: {unanswered}"
