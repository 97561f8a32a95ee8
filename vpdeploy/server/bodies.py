"""Request bodies read within limits, response bodies compressed where the client asks for it."""

from __future__ import annotations

import io
import zlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.requests import Request

from vpdeploy.errors import InputError
from vpdeploy.server.budget import MemoryBudget, Reservation
from vpdeploy.server.statuses import ClientGoneError, TooLargeError
from vpdeploy.server.work import WorkPool

_WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""zlib's names for the containers that HTTP calls gzip and deflate."""

SMALL_BODY_BYTES = 64 << 10
"""Bodies up to this size are parsed on the event loop: handing them over would take as long."""

_INFLATE_STEP = 1 << 20
"""Bytes that come out of one step of inflating at most."""

_JOINED_AT_ONCE_BYTES = 4 << 20

_COMPRESSION_LEVEL = 1
_MIN_COMPRESSED_BYTES = 1024


class BodyReader:
    """Reads request bodies within a budget.

    Args:
        max_body_bytes: Size that one body may have, as sent and also after decompression.
        budget: What all bodies together may hold.
        pool: The threads that decompress bodies.
    """

    def __init__(self, *, max_body_bytes: int, budget: MemoryBudget, pool: WorkPool) -> None:
        self._max_body_bytes = max_body_bytes
        self._budget = budget
        self._pool = pool

    @asynccontextmanager
    async def body(self, request: Request, *, line: str) -> AsyncIterator[bytes]:
        """Read and decompress a request's body; its bytes count until the context ends.

        Args:
            request: The request.
            line: Whose turn the work on it takes.

        Raises:
            TooLargeError: The body is larger than one may be; the rest is not read.
            QueueFullError: All bodies together, or this client's, are larger than they may be.
            InputError: The body's compression is unknown or damaged.
            ClientGoneError: The client left before the whole body was sent, or sent it too slowly.
        """
        with self._budget.reserve(client_of(request)) as reservation:
            body = await self._read(request, line, reservation)
            encoding = header_of(request, b"content-encoding", "identity").strip().lower()
            if encoding not in ("identity", ""):
                inflate = partial(decompress, body, encoding, self._max_body_bytes, reservation)
                inflating = self._pool.submit(line, inflate)
                sent, body = len(body), b""
                body = await inflating
                del inflate, inflating
                reservation.shrink(sent)
            yield body

    async def _read(self, request: Request, line: str, reservation: Reservation) -> bytes:
        declared = header_of(request, b"content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        held = 0
        chunks: deque[bytes] = deque()
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client left before its request was complete")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            held += len(chunk)
            if held > self._max_body_bytes:
                raise _too_large(self._max_body_bytes)
            reservation.grow(len(chunk))
            chunks.append(chunk)
        if held <= _JOINED_AT_ONCE_BYTES:
            return b"".join(chunks)
        return await self._pool.submit(line, partial(_join, chunks))


def _join(chunks: deque[bytes]) -> bytes:
    """Join chunks one by one, each given up as it goes: nothing is held twice, and other threads may run."""
    body = io.BytesIO()
    while chunks:
        body.write(chunks.popleft())
    return body.getvalue()


def header_of(request: Request, name: bytes, default: str) -> str:
    """Return a header's value by its name in lower case: a look at the list takes a tenth of the framework's way."""
    for each, value in request.scope["headers"]:
        if each == name:
            return str(value, "latin-1")
    return default


def client_of(request: Request) -> str:
    """Return whose share of the budget a request takes: its client's address."""
    return request.client.host if request.client is not None else ""


def decompress(data: bytes, encoding: str, max_bytes: int, reservation: Reservation) -> bytes:
    """Decompress a request body, never to more than ``max_bytes``.

    Args:
        data: The body as sent.
        encoding: The Content-Encoding.
        max_bytes: Bytes that may come out.
        reservation: Grows with what comes out, before it does.

    Raises:
        InputError: The encoding is unknown, or the data is damaged, truncated or overlong.
        TooLargeError: More bytes would come out.
        QueueFullError: The budget does not hold them now.
    """
    if encoding not in _WINDOW_BITS:
        raise InputError(f"Content-Encoding '{encoding[:40]}' is not accepted; expected gzip or deflate")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    plain = io.BytesIO()
    rest: bytes | memoryview = memoryview(data)
    try:
        # Some input at a time, too: zlib copies what is left of it at every step.
        for start in range(0, len(data), _INFLATE_STEP):
            rest = data[start : start + _INFLATE_STEP]
            while rest and not inflater.eof:
                step = min(_INFLATE_STEP, max_bytes + 1 - plain.tell())
                reservation.grow(step)
                reservation.shrink(step - plain.write(inflater.decompress(rest, step)))
                rest = inflater.unconsumed_tail
                if plain.tell() > max_bytes:
                    raise _too_large(max_bytes)
            if inflater.eof and (inflater.unused_data or start + _INFLATE_STEP < len(data)):
                raise InputError(f"the {encoding} body is overlong")
    except zlib.error as error:
        raise InputError(f"the body is not valid {encoding}: {error}") from None
    if not inflater.eof:
        raise InputError(f"the {encoding} body is truncated")
    return plain.getvalue()


def compress_for(accepted: str, body: bytes) -> tuple[bytes, dict[str, str]]:
    """Compress a response body if the client accepts it and it pays.

    Args:
        accepted: The request's ``Accept-Encoding``.
        body: The plain body.

    Returns:
        The body to send and the headers to send with it.
    """
    if len(body) < _MIN_COMPRESSED_BYTES:
        return body, {}
    offered = {name.strip().lower() for name, _, weight in _weights(accepted) if weight.strip() not in ("q=0", "q=0.0")}
    for encoding, window_bits in _WINDOW_BITS.items():
        if encoding in offered:
            deflater = zlib.compressobj(_COMPRESSION_LEVEL, zlib.DEFLATED, window_bits)
            return deflater.compress(body) + deflater.flush(), {"Content-Encoding": encoding}
    return body, {}


def _weights(accepted: str) -> list[tuple[str, str, str]]:
    return [part.partition(";") for part in accepted.split(",")]


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the request body is larger than the accepted {max_bytes} bytes; send fewer images at once")
