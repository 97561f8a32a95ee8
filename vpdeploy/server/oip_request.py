"""Inference requests of the Open Inference Protocol v2, in whatever form they came, checked strictly.

A form, JSON or protobuf, is read into a ``Message``; ``read_request`` makes of it what the server does. Every complaint
is one line.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vpdeploy.errors import InputError
from vpdeploy.format.layout import IMAGE, LOGITS
from vpdeploy.server.oip_tensors import InputTensor, as_pixels, unpack_elements
from vpdeploy.server.statuses import TooLargeError
from vpdeploy.serving.queue import LAST_PRIORITY, NORMAL_PRIORITY, Pixels

_T = TypeVar("_T")

PROBABILITIES = "probabilities"
LABEL = "label"
TASK = "task"
"""The second input of the bundle as a model: the name of the task that each image is for."""

OUTPUTS = (LOGITS, PROBABILITIES, LABEL)
"""The outputs of every task, in the order in which they are returned when none is asked for."""

EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
"""Asks for an empty response at the end of those of one request, which here has one and needs no other."""

_MAX_TIMEOUT_US = 10**12


@dataclass(frozen=True, kw_only=True)
class OutputWish:
    """One output that a message asks for, unchecked.

    Attributes:
        name: Whatever stands for a name.
        parameters: Its parameters.
    """

    name: object
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """An inference request as its form carries it.

    Attributes:
        id: The client's name for the request; empty where it has none.
        parameters: The request's parameters.
        inputs: The input tensors.
        outputs: The outputs asked for.
    """

    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[InputTensor]
    outputs: Sequence[OutputWish]


@dataclass(frozen=True, kw_only=True)
class RequestedOutput:
    """One output that a request asks for.

    Attributes:
        name: One of ``OUTPUTS``.
        binary: Whether it is returned as raw bytes, in forms that have another way.
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
        tasks: The task of each image; empty where all are for the task that the request is sent to.
        outputs: The outputs to return, in order.
        deadline_s: How long the client waits, in s; None where it does not say.
        priority: Its level within its task, from 1, which goes first.
    """

    id: str | None
    images: list[bytes] | list[Pixels]
    tasks: tuple[str, ...] = ()
    outputs: tuple[RequestedOutput, ...]
    deadline_s: float | None
    priority: int = NORMAL_PRIORITY


def read_request(
    message: Message, *, image_size: int, max_images: int, inputs: Sequence[str] = (IMAGE,)
) -> InferRequest:
    """Check a request and take its images out of it.

    Args:
        message: The request as it came.
        image_size: Height and width of images sent as pixels.
        max_images: Images that one request may hold.
        inputs: The inputs of the model: the images, and the tasks where it does not stand for one.

    Raises:
        InputError: It is no valid request.
        TooLargeError: It holds more than is accepted.
    """
    _check_parameters(message.parameters)
    tensors = {tensor.name: tensor for tensor in message.inputs}
    if len(tensors) != len(message.inputs) or set(tensors) != set(inputs):
        expected = f"exactly one input, '{IMAGE}'" if len(inputs) == 1 else f"the inputs {name_tensors(inputs)}"
        raise InputError(f"expected {expected}, found {name_tensors([tensor.name for tensor in message.inputs])}")
    images = _images(tensors[IMAGE], image_size=image_size, max_images=max_images)
    return InferRequest(
        id=message.id or None,
        images=images,
        tasks=_tasks(tensors[TASK], len(images)) if TASK in tensors else (),
        outputs=_outputs(message.outputs, binary=take(message.parameters, "binary_data_output", bool, False)),
        deadline_s=_deadline(take(message.parameters, "timeout", int, 0)),
        priority=_priority(take(message.parameters, "priority", int, 0)),
    )


def take(fields: Mapping[str, Any], name: str, kind: type[_T], default: _T) -> _T:
    """Return a field of the given type; ``default`` where it is missing or null.

    Raises:
        InputError: It has another type.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"field '{name}' should be {kind.__name__}, found {type(value).__name__}")
    return value


def refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    """Refuse a tensor that lies elsewhere.

    Raises:
        InputError: The tensor's parameters name a region of shared memory.
    """
    if "shared_memory_region" in parameters:
        raise InputError("shared memory is not supported; send and take tensors in request and response")


def name_tensors(names: Sequence[object]) -> str:
    """Name tensors in an error, whatever they are."""
    shown = [f"'{name[:40]}'" if isinstance(name, str) else "one without a name" for name in names[:5]]
    return ", ".join(shown) or "none"


def _images(tensor: InputTensor, *, image_size: int, max_images: int) -> list[bytes] | list[Pixels]:
    """Return the images of the input tensor."""
    datatype, shape = tensor.datatype, tensor.shape
    accepted = {"BYTES": ((), (1,)), "UINT8": ((image_size, image_size, 3),)}
    if datatype not in accepted:
        raise InputError(f"input '{IMAGE}' should be BYTES (encoded files) or UINT8 (pixels), found '{datatype[:40]}'")
    if not shape or shape[1:] not in accepted[datatype]:
        pixels = f"[B, {image_size}, {image_size}, 3]"
        expected = "[B] or [B, 1]" if datatype == "BYTES" else pixels
        raise InputError(f"input '{IMAGE}' of {datatype} should have shape {expected}, found {str(list(shape))[:80]}")
    count = shape[0]
    if count > max_images:
        raise TooLargeError(f"a request holds at most {max_images} images, found {str(count)[:20]}")
    if count < 1:
        raise InputError(f"input '{IMAGE}' should hold at least one image, found {str(count)[:20]}")
    if datatype == "BYTES":
        return _files(tensor, count)
    if not isinstance(tensor.data, memoryview):
        raise InputError(f"input '{IMAGE}': UINT8 data should be integers in [0, 255]")
    return as_pixels(IMAGE, tensor.data, shape)


def _files(tensor: InputTensor, count: int) -> list[bytes]:
    if isinstance(tensor.data, memoryview):
        return unpack_elements(IMAGE, tensor.data, count)
    if len(tensor.data) != count:
        raise InputError(f"input '{IMAGE}': expected {count} encoded files, found {len(tensor.data)} values")
    files: list[bytes] = []
    for element in tensor.data:
        if isinstance(element, str):
            try:
                element = base64.b64decode(element, validate=True)
            except ValueError:
                raise InputError(
                    f"input '{IMAGE}': BYTES in JSON should be base64; or send the files as binary data"
                ) from None
        files.append(element)
    return files


def _tasks(tensor: InputTensor, count: int) -> tuple[str, ...]:
    """Return the names of the tasks, one for each image."""
    if tensor.datatype != "BYTES" or tensor.shape not in ((count,), (count, 1)):
        raise InputError(
            f"input '{TASK}' should be BYTES [{count}], one name for each image, found '{tensor.datatype[:40]}' "
            f"{str(list(tensor.shape))[:80]}"
        )
    names = unpack_elements(TASK, tensor.data, count) if isinstance(tensor.data, memoryview) else tensor.data
    if len(names) != count:
        raise InputError(f"input '{TASK}': expected {count} names, found {len(names)}")
    return tuple(name if isinstance(name, str) else name.decode(errors="replace") for name in names)


def _outputs(wishes: Sequence[OutputWish], *, binary: bool) -> tuple[RequestedOutput, ...]:
    if not wishes:
        return tuple(RequestedOutput(name=name, binary=binary) for name in OUTPUTS)
    outputs: list[RequestedOutput] = []
    for wish in wishes:
        name, parameters = wish.name, wish.parameters
        if not isinstance(name, str) or name not in OUTPUTS:
            raise InputError(f"outputs are {', '.join(OUTPUTS)}; found {name_tensors([name])}")
        class_count = take(parameters, "classification", int, 0)
        if class_count < 0 or (class_count and name == LABEL):
            raise InputError(f"output '{name}': classification should be a count, of {LOGITS} or {PROBABILITIES}")
        refuse_shared_memory(parameters)
        outputs.append(
            RequestedOutput(name=name, binary=take(parameters, "binary_data", bool, binary), class_count=class_count)
        )
    if len({output.name for output in outputs}) != len(outputs):
        raise InputError(f"an output is asked for twice: {name_tensors([wish.name for wish in wishes])}")
    return tuple(outputs)


def _priority(level: int) -> int:
    if level < 0:
        raise InputError(f"priority should be 0 for the usual one, or a level from 1 on, found {str(level)[:20]}")
    return min(level, LAST_PRIORITY) or NORMAL_PRIORITY


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse what would mean something to Triton and is not done here; other parameters are the client's own."""
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if parameters.get(name) not in (None, 0, "", False):
            raise InputError(f"'{name}': sequences are not supported, each request stands alone; leave it out")
    for name in parameters:
        if name.startswith("triton_") and name != EMPTY_FINAL_RESPONSE:
            raise InputError(
                f"parameter '{name[:40]}': keys that start with 'triton_' are reserved; "
                f"accepted is {EMPTY_FINAL_RESPONSE}"
            )


def _deadline(timeout_us: int) -> float | None:
    if not 0 <= timeout_us <= _MAX_TIMEOUT_US:
        raise InputError(f"timeout should be microseconds in [0, {_MAX_TIMEOUT_US}]")
    return timeout_us / 1e6 or None
