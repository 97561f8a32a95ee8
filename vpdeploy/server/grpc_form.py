"""The gRPC form of inference requests and responses.

A request is read by the few lines here and not by protobuf: they count before they make anything, where protobuf makes
a hundred bytes of every two that a hostile message has, and they leave the images where they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpdeploy.errors import InputError
from vpdeploy.server.grpc_messages import message_class
from vpdeploy.server.oip_request import InferRequest, Message, OutputWish, refuse_shared_memory
from vpdeploy.server.oip_tensors import InputTensor, OutputTensor
from vpdeploy.server.statuses import TooLargeError

_MAX_FIELDS = 4096
"""Fields of one request, of all its parts together; a sensible one has a few for each tensor."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf's encoding."""

_UINT_CONTENTS, _BYTES_CONTENTS = 4, 8
_CONTENTS = {1: "bool", 2: "int", 3: "int64", 4: "uint", 5: "uint64", 6: "fp32", 7: "fp64", 8: "bytes"}
"""Fields of InferTensorContents."""

_Field = tuple[int, Any]


@dataclass(frozen=True, kw_only=True)
class InferCall:
    """A request for inference, with the model that it names.

    Attributes:
        model: The model's name.
        version: Its version; empty where the client does not mind.
        message: What is asked.
    """

    model: str
    version: str
    message: Message


def parse_call(data: bytes, *, max_values: int) -> InferCall:
    """Read a ModelInferRequest; its raw tensors are views of ``data``.

    Args:
        data: The encoded message.
        max_values: Numbers that a tensor outside of the raw contents may have.

    Raises:
        InputError: It is no such message.
        TooLargeError: It holds more than is accepted.
    """
    reader = _Reader()
    texts = {1: "", 2: "", 3: ""}
    parameters: dict[str, Any] = {}
    inputs: list[_Input] = []
    outputs: list[OutputWish] = []
    raw: list[memoryview] = []
    for number, value in reader.fields(memoryview(data)):
        if number in texts:
            texts[number] = _text(value)
        elif number == 4:
            reader.add_parameter(parameters, value)
        elif number == 5:
            inputs.append(_Input(reader, value, max_values))
        elif number == 6:
            outputs.append(_wish(reader, value))
        elif number == 7:
            raw.append(_view(value))
    if raw and len(raw) != len(inputs):
        raise InputError(f"raw_input_contents should hold {len(inputs)} tensors, one for each input, found {len(raw)}")
    message = Message(
        id=texts[3],
        parameters=parameters,
        inputs=[each.tensor(raw[index] if raw else None) for index, each in enumerate(inputs)],
        outputs=outputs,
    )
    return InferCall(model=texts[1], version=texts[2], message=message)


def render_call(request: InferRequest, model: tuple[str, str], tensors: Sequence[OutputTensor]) -> Any:
    """Return the answer to one request as a ModelInferResponse; see ``oip_json.render_message``."""
    return _RESPONSE(
        model_name=model[0],
        model_version=model[1],
        id=request.id or "",
        outputs=[{"name": each.name, "datatype": each.datatype, "shape": each.shape} for each in tensors],
        raw_output_contents=[each.to_bytes() for each in tensors],
    )


_RESPONSE = message_class("ModelInferResponse")


class _Reader:
    """Reads the fields of one message and its parts, of which there may be only so many."""

    def __init__(self) -> None:
        self._left = _MAX_FIELDS

    def fields(self, data: memoryview) -> Iterator[_Field]:
        """Yield numbers and values of fields: integers, or views of the bytes of everything else."""
        position, end = 0, len(data)
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise TooLargeError(f"the request has more than {_MAX_FIELDS} fields; send tensors as raw contents")
            tag, position = _varint(data, position)
            kind = tag & 7
            if kind == _VARINT:
                value, position = _varint(data, position)
                yield tag >> 3, value
                continue
            if kind == _BYTES:
                size, position = _varint(data, position)
            elif kind in (_FIXED64, _FIXED32):
                size = 8 if kind == _FIXED64 else 4
            else:
                raise InputError(f"the request is no ModelInferRequest: wire type {kind} at byte {position}")
            if size > end - position:
                raise InputError(f"the request is truncated: a field should have {size} bytes, {end - position} follow")
            yield tag >> 3, data[position : position + size]
            position += size

    def add_parameter(self, parameters: dict[str, Any], data: Any) -> None:
        """Read one entry of a map of parameters."""
        name, parameter = "", None
        for number, value in self.fields(_view(data)):
            if number == 1:
                name = _text(value)
            elif number == 2:
                for choice, content in self.fields(_view(value)):
                    parameter = _choice(choice, content)
        parameters[name] = parameter


class _Input:
    """One input tensor on its way."""

    def __init__(self, reader: _Reader, data: Any, max_values: int) -> None:
        self._name, self._datatype = "", ""
        self._shape: list[int] = []
        self._numbers: list[memoryview | int] = []
        self._elements: list[bytes] = []
        self._has_contents = False
        parameters: dict[str, Any] = {}
        for number, value in reader.fields(_view(data)):
            if number == 1:
                self._name = _text(value)
            elif number == 2:
                self._datatype = _text(value)
            elif number == 3:
                self._add_sizes(value)
            elif number == 4:
                reader.add_parameter(parameters, value)
            elif number == 5:
                self._add_contents(reader, value, max_values)
        refuse_shared_memory(parameters)

    def tensor(self, raw: memoryview | None) -> InputTensor:
        """Return the tensor, whose values are in the message's raw contents if there are any."""
        if raw is not None and self._has_contents:
            raise InputError(f"input '{self._name[:40]}' has both contents and raw_input_contents; send one of them")
        data: memoryview | list[bytes]
        if raw is not None:
            data = raw
        elif self._datatype == "BYTES":
            data = self._elements
        else:
            data = self._small_numbers()
        return InputTensor(name=self._name, datatype=self._datatype, shape=tuple(self._shape), data=data)

    def _add_sizes(self, value: Any) -> None:
        sizes = [value]
        if isinstance(value, memoryview):  # packed
            sizes, position = [], 0
            while position < len(value) and len(sizes) <= _MAX_DIMENSIONS:
                size, position = _varint(value, position)
                sizes.append(size)
        self._shape += [_signed(size) for size in sizes]
        if len(self._shape) > _MAX_DIMENSIONS:
            raise InputError(f"input '{self._name[:40]}' should have at most {_MAX_DIMENSIONS} dimensions")

    def _add_contents(self, reader: _Reader, data: Any, max_values: int) -> None:
        wanted = _BYTES_CONTENTS if self._datatype == "BYTES" else _UINT_CONTENTS
        for number, value in reader.fields(_view(data)):
            if number not in _CONTENTS:
                continue
            if number != wanted:
                raise InputError(
                    f"contents of {self._datatype[:40] or 'no datatype'} should be {_CONTENTS[wanted]}_contents, found "
                    f"{_CONTENTS[number]}_contents; or send raw_input_contents"
                )
            self._has_contents = True
            if number == _BYTES_CONTENTS:
                self._elements.append(bytes(_view(value)))
                continue
            if isinstance(value, memoryview) and len(value) > 2 * max_values:
                raise TooLargeError(
                    f"the contents have more than {max_values} values; send images as raw_input_contents"
                )
            self._numbers.append(value)

    def _small_numbers(self) -> memoryview:
        """Return unsigned integers, packed or one by one, as bytes."""
        return memoryview(b"".join(map(self._as_bytes, self._numbers)))

    def _as_bytes(self, value: memoryview | int) -> bytes:
        wrong = InputError(f"input '{self._name[:40]}': UINT8 contents should be integers in [0, 255]")
        if isinstance(value, int):
            if value > 255:
                raise wrong
            return bytes([value])

        # A number up to 255 has one byte, or two of which the second is 0 or 1.
        packed = np.frombuffer(value, np.uint8)
        last = packed < 0x80
        ends = np.flatnonzero(last)
        if not len(packed):
            return b""
        if not last[-1]:
            raise wrong
        lengths = np.diff(ends, prepend=-1)
        if lengths.max() > 2:
            raise wrong
        high = np.where(lengths == 2, packed[ends], 0)
        if high.max() > 1:
            raise wrong
        low = packed[ends - lengths + 1] & 0x7F
        numbers: bytes = (low | (high << 7)).astype(np.uint8).tobytes()
        return numbers


_MAX_DIMENSIONS = 8


def _wish(reader: _Reader, data: Any) -> OutputWish:
    name = ""
    parameters: dict[str, Any] = {}
    for number, value in reader.fields(_view(data)):
        if number == 1:
            name = _text(value)
        elif number == 2:
            reader.add_parameter(parameters, value)
    return OutputWish(name=name, parameters=parameters)


def _choice(number: int, value: Any) -> Any:
    """Return the value of an InferParameter."""
    if number == 1:
        return bool(_integer(value))
    if number == 2:
        return _signed(_integer(value))
    if number == 3:
        return _text(value)
    if number == 4 and len(_view(value)) == 8:
        return struct.unpack("<d", value)[0]
    if number == 5:
        return _integer(value)
    return None


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Read one integer of seven bits a byte, and where it ends."""
    result = 0
    for index, byte in enumerate(data[position : position + 10]):
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, position + index + 1
    raise InputError(f"the request is no ModelInferRequest: a number does not end at byte {position}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _view(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise InputError("the request is no ModelInferRequest: a number stands where a text or a message should")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise InputError("the request is no ModelInferRequest: a text stands where a number should")
    return value


def _text(value: Any) -> str:
    try:
        return str(_view(value), "utf-8")
    except UnicodeDecodeError:
        raise InputError("the request is no ModelInferRequest: a text is not UTF-8") from None
