"""The HTTP form of inference requests and responses: JSON, and raw bytes after it (the binary-tensor extension)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

from vpdeploy.errors import InputError
from vpdeploy.format.layout import IMAGE
from vpdeploy.server.oip_request import InferRequest, Message, OutputWish, name_tensors, refuse_shared_memory, take
from vpdeploy.server.oip_tensors import InputTensor, OutputTensor
from vpdeploy.server.statuses import TooLargeError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that tells where the JSON ends and the raw bytes begin."""

_MAX_DEPTH = 8
"""Dimensions in which the numbers of a tensor may be nested."""


def parse_message(body: bytes, header_length: str | None, *, max_json_bytes: int, max_json_values: int) -> Message:
    """Parse the body of an inference request.

    Args:
        body: The decompressed body.
        header_length: Value of the HTTP header Inference-Header-Content-Length, or None.
        max_json_bytes: Size that the JSON part may have.
        max_json_values: Values, lists and objects that it may hold.

    Raises:
        InputError: The body is no valid request.
        TooLargeError: The request holds more than is accepted.
    """
    text, raw = _split(body, header_length)
    if len(text) > max_json_bytes:
        raise TooLargeError(
            f"the JSON has {len(text)} bytes, accepted are {max_json_bytes}; send images as binary data"
        )
    # Nothing else runs while JSON is parsed. Counting its marks is a hundred times as fast, and never counts too few.
    values = sum(map(text.count, (b",", b"[", b"{")))
    if values > max_json_values:
        raise TooLargeError(
            f"the JSON has up to {values} values, accepted are {max_json_values}; send images as binary data"
        )
    document = _parse_json(text)
    return Message(
        id=take(document, "id", str, ""),
        parameters=take(document, "parameters", dict, {}),
        inputs=_inputs(take(document, "inputs", list, []), raw),
        outputs=[_wish(entry) for entry in take(document, "outputs", list, [])],
    )


def render_message(
    request: InferRequest, model: tuple[str, str], tensors: Sequence[OutputTensor]
) -> tuple[bytes, int | None]:
    """Encode the answer to one request.

    Args:
        request: What was asked.
        model: Name and version of the model that answered.
        tensors: The outputs that the request asks for, in its order.

    Returns:
        The body, and the length of its JSON if raw bytes follow it.
    """
    entries: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for output, tensor in zip(request.outputs, tensors, strict=True):
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if output.binary:
            raw.append(tensor.to_bytes())
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            entry["data"] = tensor.values.ravel().tolist()
        entries.append(entry)
    document = {"model_name": model[0], "model_version": model[1], "outputs": entries}
    if request.id is not None:
        document["id"] = request.id
    text = json.dumps(document, separators=(",", ":")).encode()
    if not any(output.binary for output in request.outputs):
        return text, None
    return b"".join([text, *raw]), len(text)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Divide a body into its JSON and the raw bytes after it."""
    if header_length is None:
        return body, memoryview(b"")
    text = header_length.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 20) or int(text) > len(body):
        raise InputError(
            f"{HEADER_LENGTH} should be a number of bytes up to the body's {len(body)}, found '{text[:40]}'"
        )
    length = int(text)
    return body[:length], memoryview(body)[length:]


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(str(text, "utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise InputError(f"the request should be a JSON object, found {type(document).__name__}")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _inputs(entries: list[Any], raw: memoryview) -> list[InputTensor]:
    """Return the input tensors; their raw bytes follow each other in their order."""
    tensors: list[InputTensor] = []
    rest = raw
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError(f"expected exactly one input, '{IMAGE}', found {name_tensors([None])}")
        name: str = entry["name"]
        shape = take(entry, "shape", list, [])
        if any(type(size) is not int for size in shape):
            raise InputError(f"input '{name[:40]}': the shape should be a list of integers")
        datatype = take(entry, "datatype", str, "")
        parameters = take(entry, "parameters", dict, {})
        refuse_shared_memory(parameters)
        data: memoryview | list[bytes] | list[str]
        if "binary_data_size" in parameters:
            size = take(parameters, "binary_data_size", int, 0)
            if "data" in entry:
                raise InputError(f"input '{name[:40]}' has both data and binary_data_size; send one of them")
            if not 0 <= size <= len(rest):
                raise InputError(
                    f"input '{name[:40]}': binary_data_size is {str(size)[:20]}, but {len(rest)} bytes follow"
                )
            data, rest = rest[:size], rest[size:]
        else:
            data = _plain_data(name, datatype, take(entry, "data", list, []))
        tensors.append(InputTensor(name=name, datatype=datatype, shape=tuple(shape), data=data))
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the JSON that no input's binary_data_size names")
    return tensors


def _plain_data(name: str, datatype: str, data: list[Any]) -> memoryview | list[str]:
    """Return the data that stands in the JSON, flat or nested: strings, or the bytes of UINT8."""
    for _ in range(_MAX_DEPTH):
        if not data or not isinstance(data[0], list):
            break
        if not all(isinstance(item, list) for item in data):
            raise InputError(f"input '{name[:40]}': the data is nested unevenly")
        data = list(chain.from_iterable(data))
    if datatype == "UINT8":
        try:
            return memoryview(bytes(data))
        except (TypeError, ValueError):
            raise InputError(f"input '{name[:40]}': UINT8 data should be integers in [0, 255]") from None
    if not all(isinstance(item, str) for item in data):
        raise InputError(f"input '{name[:40]}': {datatype[:40] or 'its'} data in JSON should be strings")
    return data


def _wish(entry: Any) -> OutputWish:
    if not isinstance(entry, dict):
        return OutputWish(name=None, parameters={})
    return OutputWish(name=entry.get("name"), parameters=take(entry, "parameters", dict, {}))
