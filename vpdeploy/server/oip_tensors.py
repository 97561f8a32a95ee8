"""Tensors as every form of the Open Inference Protocol carries them: names, types, shapes and values."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import InputError

_LENGTH = struct.Struct("<I")

Values = npt.NDArray[Any]
"""float32, or object for strings."""


@dataclass(frozen=True, kw_only=True)
class InputTensor:
    """One input of a request, before it is known what it should be.

    Attributes:
        name: Its name.
        datatype: The protocol's name of its type.
        shape: Its shape, as the client says.
        data: The raw bytes; or the elements of a BYTES tensor, as bytes, or as text where the form knows only text.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | list[bytes] | list[str]


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One output of a response.

    Attributes:
        name: Its name.
        values: float32, or object of str.
    """

    name: str
    values: Values

    @property
    def datatype(self) -> str:
        """The protocol's name of its type."""
        return "BYTES" if self.values.dtype == object else "FP32"

    @property
    def shape(self) -> list[int]:
        """Its shape."""
        return list(self.values.shape)

    def to_bytes(self) -> bytes:
        """Return the raw bytes: little-endian, in C order."""
        if self.values.dtype == object:
            return pack_elements([str(value).encode(errors="replace") for value in self.values.ravel()])
        return self.values.astype("<f4", copy=False).tobytes()


def unpack_elements(name: str, data: memoryview, count: int) -> list[bytes]:
    """Read the raw bytes of a BYTES tensor: every element is preceded by its length, 4 bytes, little-endian.

    Args:
        name: The tensor's name, for errors.
        data: The raw bytes.
        count: How many elements the tensor's shape has room for.

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
                f"element {len(elements)} of the BYTES tensor '{name}' should have {length} bytes, "
                f"{len(data) - offset} are left"
            )
        elements.append(bytes(data[offset : offset + length]))
        offset += length
    if len(elements) != count or offset != len(data):
        raise InputError(
            f"the BYTES tensor '{name}' should hold {count} elements, found {len(elements)} and "
            f"{len(data) - offset} more bytes"
        )
    return elements


def pack_elements(elements: Sequence[bytes]) -> bytes:
    """Write the raw bytes of a BYTES tensor."""
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def as_pixels(name: str, raw: memoryview, shape: tuple[int, ...]) -> list[npt.NDArray[np.uint8]]:
    """Return the rows of a UINT8 tensor, as views of its raw bytes.

    Raises:
        InputError: There are more or fewer bytes than the shape has elements.
    """
    expected = math.prod(shape)
    if len(raw) != expected:
        raise InputError(f"input '{name}' of shape {list(shape)} should have {expected} bytes, found {len(raw)}")
    return list(np.frombuffer(raw, dtype=np.uint8).reshape(shape))
