"""The binary-tensor extension of the Open Inference Protocol: a JSON header followed by the tensors' raw bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vpdeploy.errors import InputError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that tells where the JSON ends and the raw bytes begin."""

_LENGTH = struct.Struct("<I")


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Divide a body into its JSON and the raw bytes after it.

    Args:
        body: The decompressed body.
        header_length: The value of the HTTP header; None where there is none and the whole body is JSON.

    Raises:
        InputError: The length is no number, or reaches beyond the body.
    """
    if header_length is None:
        return body, memoryview(b"")
    text = header_length.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 20) or int(text) > len(body):
        raise InputError(
            f"{HEADER_LENGTH} should be a number of bytes up to the body's {len(body)}, found '{text[:40]}'"
        )
    length = int(text)
    return body[:length], memoryview(body)[length:]


def unpack_elements(data: memoryview, count: int) -> list[bytes]:
    """Read a BYTES tensor: every element is preceded by its length, 4 bytes, little-endian.

    Raises:
        InputError: The data does not hold exactly ``count`` elements.
    """
    elements: list[bytes] = []
    offset = 0
    while offset < len(data) and len(elements) < count:
        if offset + _LENGTH.size > len(data):
            break
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        if length > len(data) - offset:
            raise InputError(
                f"element {len(elements)} of the BYTES tensor should have {length} bytes, {len(data) - offset} are left"
            )
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    if len(elements) != count or offset != len(data):
        raise InputError(
            f"the BYTES tensor should hold {count} elements, found {len(elements)} and {len(data) - offset} more bytes"
        )
    return elements


def pack_elements(elements: Sequence[bytes]) -> bytes:
    """Write a BYTES tensor."""
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)
