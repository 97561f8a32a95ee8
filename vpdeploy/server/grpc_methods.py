"""What each method of the Open Inference Protocol answers over gRPC. Every method runs in a thread of its own call."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from vpdeploy.errors import InputError, ShuttingDownError, TaskNotFoundError
from vpdeploy.format.layout import IMAGE
from vpdeploy.server.access import Grant
from vpdeploy.server.bodies import SMALL_BODY_BYTES
from vpdeploy.server.grpc_form import InferCall, parse_call, render_call
from vpdeploy.server.grpc_messages import message_class
from vpdeploy.server.metrics import SEVERAL_TASKS, UNKNOWN_TASK
from vpdeploy.server.oip_bundle import (
    BUNDLE_INPUTS,
    BUNDLE_MODEL,
    bundle_config,
    bundle_metadata,
    bundle_statistics,
    check_bundle_version,
    classify_request,
    model_of,
)
from vpdeploy.server.oip_request import InferRequest, read_request
from vpdeploy.server.oip_response import (
    model_config,
    model_metadata,
    model_statistics,
    output_tensors,
    repository_index,
    server_metadata,
)
from vpdeploy.server.service import ServedTask, Service
from vpdeploy.server.statuses import ClientGoneError, describe_error, status_of
from vpdeploy.server.work import forget_frames

_T = TypeVar("_T")

_SMALL_REQUEST_BYTES = 64 << 10
"""Requests for anything but inference are tiny; protobuf reads no larger ones."""

_WATCH_LOOK_S = 0.5
_SERVING, _NOT_SERVING = 1, 2
_HEALTH_OF = ("", "inference.GRPCInferenceService")
"""What the health of the whole server is called."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.

    Attributes:
        client: Whose share of budgets it takes.
        grant: What it may do.
        expires_at: When its deadline passes, on the monotonic clock in s; None where it has none.
        on_end: Has a function called when the call ends; tells whether it has not ended already.
        is_active: Tells whether it has not ended.
    """

    client: str
    grant: Grant
    expires_at: float | None
    on_end: Callable[[Callable[[], Any]], bool]
    is_active: Callable[[], bool]


class Methods:
    """The methods of one server.

    Args:
        service: What answers.
        loop: The event loop of the service.
    """

    open_to_all = frozenset(("ServerLive", "ServerReady", "Check"))
    """Methods that need no token."""

    streaming = ("ModelStreamInfer", "Watch")

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._image_size = service.session.preprocessing.image_size
        self._tables: dict[str, tuple[type[Any], type[Any], Callable[[Call, Any], dict[str, Any]]]] = {
            name: (message_class(f"{name}Request"), message_class(f"{name}Response"), method)
            for name, method in (
                ("ServerLive", lambda call, request: {"live": True}),
                ("ServerReady", lambda call, request: {"ready": service.is_ready}),
                ("ServerMetadata", lambda call, request: server_metadata(service.settings.batching)),
                ("ModelReady", self._model_ready),
                ("ModelMetadata", self._metadata),
                ("ModelConfig", self._config),
                ("ModelStatistics", self._statistics),
                ("RepositoryModelLoad", self._load),
                ("RepositoryModelUnload", self._unload),
                ("RepositoryIndex", lambda call, request: {"models": repository_index(service, call.grant)}),
            )
        }
        health = (message_class(f"HealthCheck{kind}", "grpc.health.v1") for kind in ("Request", "Response"))
        self._tables["Check"] = (*health, lambda call, request: {"status": self._health(call, request.service)})
        self.unary = ("ModelInfer", *self._tables)

    def answer(self, name: str, call: Call, message: bytes) -> Any:
        """Answer a method that takes and gives one message.

        Args:
            name: The method's name.
            call: The call.
            message: The encoded request.

        Returns:
            The response, a protobuf message.

        Raises:
            VpdeployError: As for the same request over HTTP.
        """
        if name == "ModelInfer":
            return self._infer(call, message)
        request_class, response_class, method = self._tables[name]
        request = _parse(request_class, message)
        return json_format.ParseDict(method(call, request), response_class(), ignore_unknown_fields=True)

    def answer_stream(self, name: str, call: Call, message: bytes) -> Iterator[Any]:
        """Answer one message of a stream; see ``answer``. What is wrong with it is an answer too."""
        if name == "Watch":
            yield from self._watch(call, message)
            return
        request_id = ""
        try:
            parsed = parse_call(message, max_values=self._service.settings.max_json_values)
            request_id = parsed.message.id
            response = self._infer(call, message, parsed)
            response.parameters["triton_final_response"].bool_param = True
            yield _STREAMED(infer_response=response)
        except Exception as error:
            if not call.is_active():
                raise
            _, text = describe_error(error)
            forget_frames(error)
            yield _STREAMED(error_message=text, infer_response=_INFERRED(id=request_id))

    def _infer(self, call: Call, message: bytes, parsed: InferCall | None = None) -> Any:
        """Classify images, and count the request."""
        service, started, status, task = self._service, time.perf_counter(), 200, UNKNOWN_TASK
        try:
            with service.budget.reserve(call.client) as reservation:
                reservation.grow(len(message))
                if parsed is None:
                    parsed = parse_call(message, max_values=service.settings.max_json_values)
                if parsed.model in service.session.tasks:
                    task = parsed.model
                elif parsed.model == BUNDLE_MODEL:
                    task = SEVERAL_TASKS
                return self._on_loop(call, self._classify(call, parsed, len(message)))
        except Exception as error:
            status = status_of(error)
            raise
        finally:
            service.metrics.count_request(task=task, status=status, seconds=time.perf_counter() - started)

    async def _classify(self, call: Call, asked: InferCall, size: int) -> Any:
        service, settings = self._service, self._service.settings
        task = None
        if not _names_bundle(asked.model, asked.version):
            task = await service.version(asked.model, asked.version, client=call.client, grant=call.grant)
        line = service.line([asked.model], call.client, call.grant)
        inputs = BUNDLE_INPUTS if task is None else (IMAGE,)
        read = partial(
            read_request, asked.message, image_size=self._image_size, max_images=settings.max_images, inputs=inputs
        )
        request = read() if size <= SMALL_BODY_BYTES else await service.off_loop(line, read)
        answers = await classify_request(
            service, request, task, grant=call.grant, client=call.client, deadline_s=_deadline(call, request)
        )
        render = partial(_render, request, model_of(task, answers), answers)
        return await service.off_loop(line, render) if size > SMALL_BODY_BYTES else render()

    def _on_loop(self, call: Call, work: Coroutine[Any, Any, _T]) -> _T:
        """Do work on the event loop; it is cancelled when the call ends."""
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise ShuttingDownError("the server is shutting down; send the request elsewhere") from None
        if not call.on_end(future.cancel):
            future.cancel()
        try:
            return future.result()
        except CancelledError:
            raise ClientGoneError("the client left before its answer was ready") from None

    def _task(self, call: Call, name: str, version: str) -> ServedTask:
        return self._on_loop(call, self._service.version(name, version, client=call.client, grant=call.grant))

    def _named(self, call: Call, request: Any) -> ServedTask:
        return self._task(call, request.name, request.version)

    def _model_ready(self, call: Call, request: Any) -> dict[str, Any]:
        try:
            if not _names_bundle(request.name, request.version):
                self._named(call, request)
        except TaskNotFoundError:
            return {"ready": False}
        return {"ready": self._service.is_ready}

    def _metadata(self, call: Call, request: Any) -> dict[str, Any]:
        if _names_bundle(request.name, request.version):
            return bundle_metadata(self._service, call.grant)
        return model_metadata(self._named(call, request), self._image_size)

    def _config(self, call: Call, request: Any) -> dict[str, Any]:
        if _names_bundle(request.name, request.version):
            return {"config": bundle_config(self._service, call.grant)}
        batch_size = self._service.settings.batching.max_batch_size
        return {"config": model_config(self._named(call, request), self._image_size, batch_size)}

    def _statistics(self, call: Call, request: Any) -> dict[str, Any]:
        if _names_bundle(request.name, request.version):
            return bundle_statistics(self._service, call.grant)
        task = self._named(call, request) if request.name else None
        return model_statistics(self._service, call.grant, task)

    def _load(self, call: Call, request: Any) -> dict[str, Any]:
        self._service.require_administration().load(call.grant, request.model_name)
        return {}

    def _unload(self, call: Call, request: Any) -> dict[str, Any]:
        self._service.require_administration().unload(call.grant, request.model_name)
        return {}

    def _health(self, call: Call, name: str) -> int:
        if name not in _HEALTH_OF:
            raise TaskNotFoundError(f"health is that of the whole server, '' or '{_HEALTH_OF[1]}'")
        return _SERVING if self._service.is_ready else _NOT_SERVING

    def _watch(self, call: Call, message: bytes) -> Iterator[Any]:
        """Tell the health, and again whenever it changes; a server that is stopping does not wait for who listens."""
        request_class, response_class, _ = self._tables["Check"]
        request = _parse(request_class, message)
        told = None
        ended = threading.Event()
        call.on_end(ended.set)
        while call.is_active() and not (self._service.draining and told == _NOT_SERVING):
            health = self._health(call, request.service)
            if health != told:
                told = health
                yield response_class(status=health)
            ended.wait(_WATCH_LOOK_S)


def _names_bundle(model: str, version: str) -> bool:
    if model != BUNDLE_MODEL:
        return False
    check_bundle_version(version)
    return True


_INFERRED = message_class("ModelInferResponse")
_STREAMED = message_class("ModelStreamInferResponse")


def _parse(request_class: type[Any], message: bytes) -> Any:
    if len(message) > _SMALL_REQUEST_BYTES:
        raise InputError(f"the request should have at most {_SMALL_REQUEST_BYTES} bytes, found {len(message)}")
    try:
        return request_class.FromString(message)
    except DecodeError:
        raise InputError(f"the request is no {request_class.DESCRIPTOR.name}") from None


def _render(request: InferRequest, model: tuple[str, str], answers: Any) -> Any:
    return render_call(request, model, output_tensors(request, answers))


def _deadline(call: Call, request: InferRequest) -> float | None:
    """Return how long the client waits, in s: by its call's deadline, or by the request's own."""
    left = [] if call.expires_at is None else [max(0.0, call.expires_at - time.monotonic())]
    return min(left + ([] if request.deadline_s is None else [request.deadline_s]), default=None)
