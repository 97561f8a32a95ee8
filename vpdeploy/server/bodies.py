"""Request bodies read within limits, response bodies compressed where the client asks for it."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from vpdeploy.errors import InputError, QueueFullError
from vpdeploy.server.statuses import ClientGoneError, TooLargeError

_WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""zlib's names for the containers that HTTP calls gzip and deflate."""

_COMPRESSION_LEVEL = 1
_MIN_COMPRESSED_BYTES = 1024


class BodyReader:
    """Reads request bodies and bounds the bytes that all of them hold at a time.

    Args:
        max_body_bytes: Size that one body may have, as sent and also after decompression.
        max_buffered_bytes: Size that all bodies together may have while they are held.
        executor: The threads that decompress bodies.
    """

    def __init__(self, *, max_body_bytes: int, max_buffered_bytes: int, executor: Executor) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self._executor = executor
        self._buffered_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        """Bytes of all bodies that are held now."""
        return self._buffered_bytes

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Read and decompress a request's body; its bytes count until the context ends.

        Raises:
            TooLargeError: The body is larger than one may be; the rest is not read.
            QueueFullError: All bodies together are larger than they may be.
            InputError: The body's compression is unknown or damaged.
            ClientGoneError: The client left before the whole body was sent.
        """
        held = 0
        try:
            self._check_declared_size(request)
            chunks: list[bytes] = []
            async for chunk in request.stream():
                held += len(chunk)
                self._buffered_bytes += len(chunk)
                self._check_sizes(held)
                chunks.append(chunk)
            body = b"".join(chunks)
            chunks.clear()
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", ""):
                loop = asyncio.get_running_loop()
                body = await loop.run_in_executor(self._executor, decompress, body, encoding, self._max_body_bytes)
                held += len(body)
                self._buffered_bytes += len(body)
            yield body
        except ClientDisconnect:
            raise ClientGoneError("the client left before its request was complete") from None
        finally:
            self._buffered_bytes -= held

    def _check_declared_size(self, request: Request) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)

    def _check_sizes(self, held: int) -> None:
        if held > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        if self._buffered_bytes > self._max_buffered_bytes:
            raise QueueFullError(
                f"the requests under way hold more than {self._max_buffered_bytes} bytes; try again later"
            )


def decompress(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress a request body, never to more than ``max_bytes``.

    Raises:
        InputError: The encoding is unknown, or the data is damaged, truncated or overlong.
        TooLargeError: More bytes would come out.
    """
    if encoding not in _WINDOW_BITS:
        raise InputError(f"Content-Encoding '{encoding[:40]}' is not accepted; expected gzip or deflate")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InputError(f"the body is not valid {encoding}: {error}") from None
    if len(plain) > max_bytes:
        raise _too_large(max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise InputError(f"the {encoding} body is {'overlong' if inflater.eof else 'truncated'}")
    return plain


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
