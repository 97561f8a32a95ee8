"""The plain image API: an image in the body, labels in the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vpdeploy.errors import InputError
from vpdeploy.server.auth import grant_of
from vpdeploy.server.bodies import SMALL_BODY_BYTES, BodyReader, client_of, header_of
from vpdeploy.server.endpoint import inference_endpoint, unless_client_leaves
from vpdeploy.server.forms import form_files
from vpdeploy.server.hot_routes import HotRoute
from vpdeploy.server.service import Classified, ServedTask, Service
from vpdeploy.session.prediction import rank_classes

DEFAULT_TOP = 5

TASK_PATH = "/v1/tasks/{task:task}"

_QUERY: list[dict[str, Any]] = [
    {
        "name": "top",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999999999, "default": DEFAULT_TOP},
    },
    {"name": "deadline_ms", "in": "query", "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9}},
]
TASK_PARAMETER = {"name": "task", "in": "path", "required": True, "schema": {"type": "string"}}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 1}}
_TASKS = {
    "name": "tasks",
    "in": "query",
    "description": "Names, separated by commas; all loaded tasks if left out.",
    "schema": {"type": "string"},
}
_IMAGE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
        },
    },
}


class _TaskConvertor(StringConvertor):
    """A task's name in a path. It holds no colon, so ``x:predict`` is never taken for one."""

    regex = "[^/:]+"


register_url_convertor("task", _TaskConvertor())


def add_image_routes(app: FastAPI, service: Service, bodies: BodyReader) -> tuple[HotRoute, ...]:
    """Add the plain image API to an app, and return the routes that carry the load."""

    async def ask(request: Request, tasks: Sequence[str]) -> tuple[list[tuple[str, bytes]], list[Classified]]:
        """Put the images of a request to tasks; returns the named files and image by image the answers."""
        client, grant = client_of(request), grant_of(request)
        line = service.line(tasks, client, grant)
        deadline_s = _deadline(request)
        async with bodies.body(request, line=line) as body:

            async def work() -> tuple[list[tuple[str, bytes]], list[Classified]]:
                read = partial(_files, content_type, body, max_files=service.settings.max_images)
                files = read() if len(body) <= SMALL_BODY_BYTES else await service.off_loop(line, read)
                images = [data for _, data in files]
                return files, await service.classify(images, tasks, grant=grant, client=client, deadline_s=deadline_s)

            content_type = header_of(request, b"content-type", "")
            return await unless_client_leaves(request, work())

    async def predict(request: Request) -> Response:
        top = _top(request)
        path = request.path_params
        files, answers = await ask(
            request, [f"{path['task']}@{path['version']}" if "version" in path else path["task"]]
        )
        fields = _task_fields(answers[0].task)
        if len(answers) == 1:
            return JSONResponse({**fields, "predictions": _predictions(answers[0], top)})
        images = [
            {"name": name, "predictions": _predictions(answer, top)}
            for (name, _), answer in zip(files, answers, strict=True)
        ]
        return JSONResponse({**fields, "images": images})

    async def fan_out(request: Request) -> Response:
        top = _top(request)
        named = [name.strip() for name in request.query_params.get("tasks", "").split(",") if name.strip()]
        tasks = list(dict.fromkeys(named)) or [task.card.name for task in service.tasks(grant_of(request))]
        files, answers = await ask(request, tasks)
        if len(files) != 1:
            raise InputError(f"expected one image for several tasks, found {len(files)}; send one at a time")
        return JSONResponse(
            {"tasks": [{**_task_fields(answer.task), "predictions": _predictions(answer, top)} for answer in answers]}
        )

    async def list_tasks(request: Request) -> Response:
        grant = grant_of(request)
        failed = [{"task": name, "reason": reason} for name, reason in service.failures(grant).items()]
        return JSONResponse(
            {
                "tasks": [_listed(task) for task in service.tasks(grant)],
                "failed": failed,
                "administered": service.administration is not None,
            }
        )

    async def show_task(request: Request) -> Response:
        task = service.task(request.path_params["task"], grant_of(request))
        card = task.card
        fields = {"method": card.method, "backbone": card.backbone.name, "labels": list(card.labels)}
        return JSONResponse({**_task_fields(task), **fields}, headers={"ETag": f'"{task.version}"'})

    predicting = HotRoute(f"{TASK_PATH}:predict", inference_endpoint(service, predict))
    app.add_api_route(
        predicting.path,
        predicting.endpoint,
        methods=["POST"],
        response_model=None,
        summary="Classify one image, or several as a form",
        openapi_extra={"parameters": [TASK_PARAMETER, *_QUERY], "requestBody": _IMAGE_BODY},
    )
    app.add_api_route(
        f"{TASK_PATH}/versions/{{version:task}}:predict",
        inference_endpoint(service, predict),
        methods=["POST"],
        response_model=None,
        summary="Ask a version of a task that the bundle keeps",
        openapi_extra={"parameters": [TASK_PARAMETER, _VERSION, *_QUERY], "requestBody": _IMAGE_BODY},
    )
    app.add_api_route(
        "/v1/predict",
        inference_endpoint(service, fan_out),
        methods=["POST"],
        response_model=None,
        summary="Put one image to several tasks at once",
        openapi_extra={"parameters": [_TASKS, *_QUERY], "requestBody": _IMAGE_BODY},
    )
    app.add_api_route("/v1/tasks", list_tasks, response_model=None, summary="List the loaded tasks")
    app.add_api_route(
        TASK_PATH,
        show_task,
        response_model=None,
        summary="Show one task and its labels",
        openapi_extra={"parameters": [TASK_PARAMETER]},
    )
    return (predicting,)


def _files(content_type: str, body: bytes, *, max_files: int) -> list[tuple[str, bytes]]:
    """Return the images of a request with their names: the body, or the files of a form."""
    if content_type.lower().startswith("multipart/form-data"):
        return form_files(content_type, body, max_files=max_files)
    if not body:
        raise InputError("the body is empty; send an image, or a form with files")
    return [("", body)]


def _task_fields(task: ServedTask) -> dict[str, Any]:
    return {"task": task.card.name, "version": task.version}


def _listed(task: ServedTask) -> dict[str, Any]:
    return {
        **_task_fields(task),
        "classes": len(task.card.labels),
        "val_accuracy": task.val_accuracy,
        "size_bytes": task.size_bytes,
    }


def _predictions(answer: Classified, top: int) -> list[dict[str, Any]]:
    card = answer.task.card
    ranking = rank_classes(card.name, card.labels, answer.logits, top=top).ranking
    return [{"label": each.label, "probability": each.probability, "index": each.index} for each in ranking]


def _top(request: Request) -> int:
    text = request.query_params.get("top", str(DEFAULT_TOP))
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) > 0):
        raise InputError(f"top should be a whole number of at least 1, found '{text[:40]}'")
    return int(text)


def _deadline(request: Request) -> float | None:
    text = request.query_params.get("deadline_ms")
    if text is None:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds <= 1e9:
        raise InputError(f"deadline_ms should be a number in (0, 1e9], found '{text[:40]}'")
    return milliseconds / 1000
