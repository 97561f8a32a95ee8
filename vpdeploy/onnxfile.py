"""The outermost fields of an ONNX file, read without a library: a protobuf message is a row of tagged fields.

The runtime knows no ``onnx``, and a native engine's graph is never loaded; only its metadata are needed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from vpdeploy.errors import BundleError

_METADATA_PROPS = 14  # ModelProto.metadata_props, a repeated StringStringEntryProto (onnx.proto)
_KEY, _VALUE = 1, 2

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def read_metadata(path: Path) -> dict[str, str]:
    """Return the key-value pairs in an ONNX file's ``metadata_props``.

    Large fields, the graph among them, are skipped and not read.

    Raises:
        BundleError: The file cannot be read, or is no protobuf message.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            entries = [
                data[start:end] for field, start, end in fields_of(data, 0, len(data)) if field == _METADATA_PROPS
            ]
        return dict(_entry(entry) for entry in entries)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not an ONNX file, or truncated; expected one written by vpdeploy export") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _entry(data: bytes) -> tuple[str, str]:
    texts = {field: data[start:end].decode() for field, start, end in fields_of(data, 0, len(data))}
    return texts.get(_KEY, ""), texts.get(_VALUE, "")


def fields_of(data: bytes | mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of each field's bytes of the protobuf message in ``data[start:end]``.

    Raises:
        ValueError: A field has an unknown wire type or reaches beyond the end.
        IndexError: The message ends within a tag.
    """
    position = start
    while position < end:
        tag, position = varint_at(data, position)
        kind = tag & 7
        if kind == _VARINT:
            begin = position
            _, position = varint_at(data, position)
        elif kind == _LENGTH:
            length, begin = varint_at(data, position)
            position = begin + length
        elif kind in (_FIXED64, _FIXED32):
            begin, position = position, position + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if position > end or tag >> 3 == 0:
            raise ValueError("a field reaches beyond the end")
        yield tag >> 3, begin, position


def varint_at(data: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    """Return a number and the position behind it.

    Raises:
        ValueError: It has more than 64 bits.
        IndexError: The data end within it.
    """
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
