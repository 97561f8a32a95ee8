"""One HTTP connection within limits: how large a request's head may be, and how long a client may take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vpdeploy.server.settings import ServerSettings

_MAX_HEAD_BYTES = 32 << 10
"""URL and headers of one request. httptools itself has no limit, and takes quadratic time over a long value."""

_MAX_HEADERS = 100

_SLICE_BYTES = 16 << 10
"""How much of a head is parsed before it is measured again."""


class _JoinedWrites:
    """A transport that sends the head of an answer together with what follows it: one system call, one packet."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Send data, or keep the head until there is more."""
        if self._head is not None:
            data, self._head = self._head + data, None
        elif data.endswith(b"\r\n\r\n") and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
            return
        self._transport.write(data)

    def close(self) -> None:
        """Send what is kept, and hang up."""
        if self._head is not None:
            self.write(b"")
        self._transport.close()


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's connection, which refuses large heads and hangs up on clients that stall.

    The server calls ``check`` about once a second.

    Args:
        settings: The limits.
        is_draining: Tells whether each answer should ask its client to go elsewhere with the next request.
        clock: Returns the time, in s; it never goes backwards.
        options: uvicorn's own arguments.
    """

    def __init__(
        self,
        *,
        settings: ServerSettings,
        is_draining: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._settings = settings
        self._is_draining = is_draining
        self._clock = clock
        self._in_head = True
        self._head_bytes = 0
        self._waiting_since = clock()
        self._body_bytes = 0
        self._body_since: float | None = None
        self._unsent_bytes = 0
        self._unsent_since = clock()

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or close it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, a head slice by slice; what is malformed is answered, and not worth a log line."""
        self._unset_keepalive_if_required()
        position = 0
        while position < len(data):
            size = _SLICE_BYTES if self._in_head else len(data) - position
            piece = data[position : position + size]
            position += size
            if self._in_head:
                if self._head_bytes == 0:
                    self._waiting_since = self._clock()
                self._head_bytes += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                pass  # it is answered as any other request
            except httptools.HttpParserError:
                self._refuse(400, "the request is not valid HTTP")
                return
            if self._in_head and (self._head_bytes > _MAX_HEAD_BYTES or len(self.headers or ()) > _MAX_HEADERS):
                self._refuse(
                    431, f"the request's head is larger than {_MAX_HEAD_BYTES} bytes or {_MAX_HEADERS} headers"
                )
                return
            if self.transport.is_closing():
                return

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """Start the app on a request whose head has arrived."""
        head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head_bytes > _MAX_HEAD_BYTES or len(self.headers) > _MAX_HEADERS:
            raise ValueError("too large a head in one piece")  # the parser refuses it
        self._in_head = False
        self._head_bytes = 0
        self._body_bytes = 0
        self._body_since = self._clock()
        super().on_headers_complete()
        if self._is_draining():
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if cycle.scope["method"] == "POST":  # its answer always has a body, were it an empty one
            cycle.transport = _JoinedWrites(cycle.transport)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._in_head = True
        self._body_since = None
        self._waiting_since = self._clock()
        super().on_message_complete()

    def check(self) -> bool:
        """Hang up where the client stalls: over a head, a body or its answer.

        Returns:
            False where it was an answer, so that the client was told nothing.
        """
        now, settings = self._clock(), self._settings

        # An answer that the client does not take; a connection that closes waits for that, too.
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent_bytes:
            self._unsent_since = now
        self._unsent_bytes = unsent
        if unsent and now - self._unsent_since > settings.body_timeout_s:
            self.transport.abort()
            return False
        if self.transport.is_closing():
            return True

        # A body that comes too slowly; while an answer to the request before it is awaited, nothing is read.
        if self._body_since is not None:
            if self.flow.read_paused:
                self._body_since = now - self._body_bytes / settings.min_body_bytes_per_s
            elif now - self._body_since > settings.body_timeout_s + self._body_bytes / settings.min_body_bytes_per_s:
                self._refuse(408, "the request's body took too long to arrive")

        # A head that does not end, or a connection on which nothing was ever asked.
        elif (self._head_bytes or self.cycle is None) and now - self._waiting_since > settings.header_timeout_s:
            self._refuse(408, "the request's head took too long to arrive")
        return True

    @property
    def owes_answer(self) -> bool:
        """Whether a request has come of which the answer, or a part of it, has not been sent."""
        if self.cycle is None:
            return False
        return not self.cycle.response_complete or self.transport.get_write_buffer_size() > 0

    def hang_up(self) -> None:
        """Close the connection at once; a handler that still works on its request is told that its client has gone."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer for the app, unless it has begun to, and hang up."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (self.pipeline or cycle.response_started):
            body = json.dumps({"error": message}).encode()
            length = str(len(body)).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: " + length + b"\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head + body)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
