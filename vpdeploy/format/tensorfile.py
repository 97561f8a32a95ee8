"""Tensors as bytes: the safetensors format, encoded and decoded with NumPy alone.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, little-endian, the length of a JSON header;
the header maps each name to ``dtype``, ``shape`` and ``data_offsets``; the tensors' bytes follow without gaps.

The edge install has NumPy, Typer and a runtime only, hence a reader of our own; the tests hold it against the
safetensors library in both directions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import BundleCorruptError

Tensors = dict[str, npt.NDArray[np.generic]]

_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 16 << 20


def decode_tensors(data: bytes, *, source: str) -> Tensors:
    """Decode the bytes of a safetensors file; ``source`` names them in errors.

    Raises:
        BundleCorruptError: The bytes are truncated, overlong, or the header makes no sense.
    """
    if len(data) < 8:
        raise BundleCorruptError(f"{source}: truncated, {len(data)} bytes are no safetensors file")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise BundleCorruptError(
            f"{source}: truncated or not safetensors: the header should have {header_bytes} bytes, "
            f"the file has {len(data)}"
        )
    body = data[8 + header_bytes :]
    try:
        header = json.loads(data[8 : 8 + header_bytes], object_pairs_hook=_unique_names)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _decode_tensor(name, entry, body) for name, entry in entries.items()}
        end = _end_of_gapless(entries.values())
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise BundleCorruptError(f"{source}: not a valid safetensors file: {error}") from error
    if end != len(body):
        raise BundleCorruptError(f"{source}: expected {end} bytes of tensors, found {len(body)}")
    return tensors


def encode_tensors(tensors: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """Encode tensors as the bytes of a safetensors file, sorted by name."""
    header: dict[str, object] = {}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        part = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("<")],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(part)],
        }
        parts.append(part)
        offset += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and refuse one that gives a name twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is given twice")
    return fields


def _end_of_gapless(entries: Iterable[Mapping[str, Any]]) -> int:
    """Return where the tensors end, after checking that they follow each other without gaps or overlaps."""
    end = 0
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in entries):
        if start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    return end


def _decode_tensor(name: str, entry: Mapping[str, Any], body: bytes) -> npt.NDArray[np.generic]:
    """Return one tensor as a read-only view into the file's bytes."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"'{name}' has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[entry["dtype"]]
    shape = list(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(isinstance(number, int) for number in (*shape, start, end)):
        raise TypeError(f"'{name}' has shape {shape} and offsets [{start}, {end}], expected integers")
    if min(shape, default=0) < 0 or not 0 <= start <= end <= len(body):
        raise ValueError(f"'{name}' has an impossible shape {shape} or offsets [{start}, {end}]")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"'{name}' of shape {shape} and {dtype} does not fill [{start}, {end}]")
    return np.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape)
