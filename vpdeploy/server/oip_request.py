"""Inference requests of the Open Inference Protocol v2: parsed strictly, every complaint in one line."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn, TypeVar

import numpy as np

from vpdeploy.errors import InputError
from vpdeploy.format.layout import IMAGE, LOGITS
from vpdeploy.server.oip_binary import split_body, unpack_elements
from vpdeploy.server.statuses import TooLargeError
from vpdeploy.serving.queue import Pixels

_T = TypeVar("_T")

PROBABILITIES = "probabilities"
LABEL = "label"
OUTPUTS = (LOGITS, PROBABILITIES, LABEL)
"""The outputs of every task, in the order in which they are returned when none is asked for."""

_MAX_TIMEOUT_US = 10**12


@dataclass(frozen=True, kw_only=True)
class RequestedOutput:
    """One output that a request asks for.

    Attributes:
        name: One of ``OUTPUTS``.
        binary: Whether it is returned as raw bytes, not in the JSON.
        class_count: How many classes to return as ``value:index:label`` instead of the tensor; 0 returns the tensor.
    """

    name: str
    binary: bool
    class_count: int = 0


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """An inference request.

    Attributes:
        id: The client's name for the request, which the response repeats; None where it has none.
        images: Encoded files, or pixels uint8 [H, W, 3] that are views of the request's body.
        outputs: The outputs to return, in order.
        deadline_s: How long the client waits, in s; None where it does not say.
    """

    id: str | None
    images: list[bytes] | list[Pixels]
    outputs: tuple[RequestedOutput, ...]
    deadline_s: float | None


def parse_request(
    body: bytes,
    header_length: str | None,
    *,
    image_size: int,
    max_images: int,
    max_json_bytes: int,
    max_json_values: int,
) -> InferRequest:
    """Parse the body of an inference request.

    Args:
        body: The decompressed body.
        header_length: Value of the HTTP header Inference-Header-Content-Length, or None.
        image_size: Height and width of images sent as pixels.
        max_images: Images that one request may hold.
        max_json_bytes: Size that the JSON part may have.
        max_json_values: Values, lists and objects that it may hold.

    Raises:
        InputError: The body is no valid request.
        TooLargeError: The request holds more than is accepted.
    """
    text, raw = split_body(body, header_length)
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
    parameters = _take(document, "parameters", dict, {})
    request_id = _take(document, "id", str, "")
    inputs = _take(document, "inputs", list, [])
    if len(inputs) != 1 or not isinstance(inputs[0], dict) or inputs[0].get("name") != IMAGE:
        raise InputError(f"expected exactly one input, '{IMAGE}', found {_names(inputs)}")
    return InferRequest(
        id=request_id or None,
        images=_images(inputs[0], raw, image_size=image_size, max_images=max_images),
        outputs=_outputs(
            _take(document, "outputs", list, []), binary=_take(parameters, "binary_data_output", bool, False)
        ),
        deadline_s=_deadline(_take(parameters, "timeout", int, 0)),
    )


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


def _images(tensor: dict[str, Any], raw: memoryview, *, image_size: int, max_images: int) -> list[bytes] | list[Pixels]:
    """Return the images of the input tensor, from the raw bytes or from the JSON."""
    datatype = _take(tensor, "datatype", str, "")
    shape = _take(tensor, "shape", list, [])
    parameters = _take(tensor, "parameters", dict, {})
    if any(type(size) is not int for size in shape):
        raise InputError(f"input '{IMAGE}': the shape should be a list of integers")
    accepted = {"BYTES": ((), (1,)), "UINT8": ((image_size, image_size, 3),)}
    if datatype not in accepted:
        raise InputError(f"input '{IMAGE}' should be BYTES (encoded files) or UINT8 (pixels), found '{datatype[:40]}'")
    if not shape or tuple(shape[1:]) not in accepted[datatype]:
        pixels = f"[B, {image_size}, {image_size}, 3]"
        expected = "[B] or [B, 1]" if datatype == "BYTES" else pixels
        raise InputError(f"input '{IMAGE}' of {datatype} should have shape {expected}, found {str(shape)[:80]}")
    count: int = shape[0]
    if count > max_images:
        raise TooLargeError(f"a request holds at most {max_images} images, found {str(count)[:20]}")
    if count < 1:
        raise InputError(f"input '{IMAGE}' should hold at least one image, found {str(count)[:20]}")
    if "shared_memory_region" in parameters:
        raise InputError("shared memory is not supported; send the image in the request")
    if "binary_data_size" not in parameters:
        if len(raw):
            raise InputError(f"{len(raw)} bytes follow the JSON, but the input names no binary_data_size")
        return _from_json(tensor, datatype, (count, image_size, image_size, 3))
    size = _take(parameters, "binary_data_size", int, 0)
    if "data" in tensor:
        raise InputError(f"input '{IMAGE}' has both data and binary_data_size; send one of them")
    if size != len(raw):
        raise InputError(f"binary_data_size is {str(size)[:20]}, but {len(raw)} bytes follow the JSON")
    if datatype == "BYTES":
        return unpack_elements(raw, count)
    return _as_pixels(raw, (count, image_size, image_size, 3))


def _from_json(tensor: dict[str, Any], datatype: str, shape: tuple[int, ...]) -> list[bytes] | list[Pixels]:
    data = _take(tensor, "data", list, [])
    depth = 0
    while data and isinstance(data[0], list) and depth < len(shape):
        if not all(isinstance(item, list) for item in data):
            raise InputError(f"input '{IMAGE}': the data is nested unevenly")
        data, depth = list(chain.from_iterable(data)), depth + 1
    if datatype == "UINT8":
        try:
            return _as_pixels(memoryview(bytes(data)), shape)
        except (TypeError, ValueError):
            raise InputError(f"input '{IMAGE}': UINT8 data should be integers in [0, 255]") from None
    if len(data) != shape[0] or not all(isinstance(item, str) for item in data):
        raise InputError(f"input '{IMAGE}': expected {shape[0]} strings of base64, found {len(data)} values")
    try:
        return [base64.b64decode(item, validate=True) for item in data]
    except ValueError:
        raise InputError(f"input '{IMAGE}': BYTES in JSON should be base64; or send the files as binary data") from None


def _as_pixels(raw: memoryview, shape: tuple[int, ...]) -> list[Pixels]:
    expected = int(np.prod(shape))
    if len(raw) != expected:
        raise InputError(f"input '{IMAGE}' of shape {list(shape)} should have {expected} bytes, found {len(raw)}")
    return list(np.frombuffer(raw, dtype=np.uint8).reshape(shape))


def _outputs(requested: list[Any], *, binary: bool) -> tuple[RequestedOutput, ...]:
    if not requested:
        return tuple(RequestedOutput(name=name, binary=binary) for name in OUTPUTS)
    outputs: list[RequestedOutput] = []
    for entry in requested:
        name = entry.get("name") if isinstance(entry, dict) else None
        if name not in OUTPUTS:
            raise InputError(f"outputs are {', '.join(OUTPUTS)}; found {_names([entry])}")
        parameters = _take(entry, "parameters", dict, {})
        class_count = _take(parameters, "classification", int, 0)
        if class_count < 0 or (class_count and name == LABEL):
            raise InputError(f"output '{name}': classification should be a count, of {LOGITS} or {PROBABILITIES}")
        if "shared_memory_region" in parameters:
            raise InputError("shared memory is not supported; take the outputs from the response")
        outputs.append(
            RequestedOutput(name=name, binary=_take(parameters, "binary_data", bool, binary), class_count=class_count)
        )
    if len({output.name for output in outputs}) != len(outputs):
        raise InputError(f"an output is asked for twice: {_names(requested)}")
    return tuple(outputs)


def _deadline(timeout_us: int) -> float | None:
    if not 0 <= timeout_us <= _MAX_TIMEOUT_US:
        raise InputError(f"timeout should be microseconds in [0, {_MAX_TIMEOUT_US}]")
    return timeout_us / 1e6 or None


def _take(fields: dict[str, Any], name: str, kind: type[_T], default: _T) -> _T:
    """Return a field of the given type; ``default`` where it is missing or null."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"field '{name}' should be {kind.__name__}, found {type(value).__name__}")
    return value


def _names(entries: list[Any]) -> str:
    """Name tensors in an error, whatever they are."""
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries[:5]]
    shown = [f"'{name[:40]}'" if isinstance(name, str) else "one without a name" for name in names]
    return ", ".join(shown) or "none"
