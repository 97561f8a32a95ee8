"""The routes of the Open Inference Protocol v2: a task is a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vpdeploy.format.layout import IMAGE
from vpdeploy.server.access import Scope
from vpdeploy.server.auth import grant_of
from vpdeploy.server.bodies import SMALL_BODY_BYTES, BodyReader, client_of, compress_for, header_of
from vpdeploy.server.endpoint import inference_endpoint, unless_client_leaves
from vpdeploy.server.hot_routes import HotRoute
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
from vpdeploy.server.oip_json import HEADER_LENGTH, parse_message, render_message
from vpdeploy.server.oip_request import InferRequest, read_request
from vpdeploy.server.oip_response import (
    model_config,
    model_metadata,
    model_statistics,
    output_tensors,
    repository_index,
    server_metadata,
)
from vpdeploy.server.service import Classified, ServedTask, Service
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statuses import refusal

LIVE_PATH = "/v2/health/live"
READY_PATH = "/v2/health/ready"

_HEADER_LENGTH = HEADER_LENGTH.lower().encode()

_MODELS = ("/v2/models/{task}", "/v2/models/{task}/versions/{version}")

_SMALL_BINARY_BYTES = 1 << 20
"""Bodies up to this size whose JSON is small are parsed on the event loop: at most, files are copied out of them."""

_SMALL_ANSWER_VALUES = 4096
"""Answers of as many logits are encoded on the event loop."""

_INFER_SCHEMA: dict[str, Any] = {
    "summary": "Classify a batch of images",
    "description": "Open Inference Protocol v2 with the binary-tensor and classification extensions: input `image` "
    "as BYTES [B] (encoded files; base64 in JSON) or UINT8 [B, H, W, 3]; outputs `logits`, `probabilities`, `label`.",
    "parameters": [{"name": "task", "in": "path", "required": True, "schema": {"type": "string"}}],
    "requestBody": {"required": True, "content": {"application/json": {}, "application/octet-stream": {}}},
}


def add_oip_routes(app: FastAPI, service: Service, bodies: BodyReader) -> tuple[HotRoute, ...]:
    """Add the protocol's routes to an app, and return those that carry the load."""
    settings = service.settings
    image_size = service.session.preprocessing.image_size

    async def served(request: Request) -> ServedTask:
        path = request.path_params
        return await service.version(
            path["task"], path.get("version"), client=client_of(request), grant=grant_of(request)
        )

    def names_bundle(request: Request) -> bool:
        if request.path_params["task"] != BUNDLE_MODEL:
            return False
        check_bundle_version(request.path_params.get("version"))
        return True

    async def infer(request: Request) -> Response:
        client, grant = client_of(request), grant_of(request)
        line = service.line([request.path_params["task"]], client, grant)
        async with bodies.body(request, line=line) as body:
            task = None if names_bundle(request) else await served(request)

            async def work() -> tuple[bytes, dict[str, str]]:
                header_length = header_of(request, _HEADER_LENGTH, "") or None
                parse = partial(
                    _parse,
                    body,
                    header_length,
                    image_size,
                    settings,
                    BUNDLE_INPUTS if task is None else (IMAGE,),
                )
                parsed = parse() if _is_soon_parsed(body, header_length) else await service.off_loop(line, parse)
                answers = await classify_request(
                    service, parsed, task, grant=grant, client=client, deadline_s=parsed.deadline_s
                )
                encode = partial(
                    _encode, parsed, model_of(task, answers), answers, header_of(request, b"accept-encoding", "")
                )
                values = sum(len(answer.logits) for answer in answers)
                return encode() if values <= _SMALL_ANSWER_VALUES else await service.off_loop(line, encode)

            content, headers = await unless_client_leaves(request, work())
        media_type = "application/octet-stream" if HEADER_LENGTH in headers else "application/json"
        return Response(content, headers=headers, media_type=media_type)

    async def live(request: Request) -> Response:
        if service.watchdog.fault is None:
            return JSONResponse({"live": True})
        return refusal(503, service.watchdog.fault)

    async def ready(request: Request) -> Response:
        doubt = service.doubt
        return JSONResponse({"ready": True}) if doubt is None else refusal(503, doubt)

    async def describe_server(request: Request) -> Response:
        return JSONResponse(server_metadata(settings.batching))

    async def metadata(request: Request) -> Response:
        if names_bundle(request):
            return JSONResponse(bundle_metadata(service, grant_of(request)))
        return JSONResponse(model_metadata(await served(request), image_size))

    async def config(request: Request) -> Response:
        if names_bundle(request):
            return JSONResponse(bundle_config(service, grant_of(request)))
        return JSONResponse(model_config(await served(request), image_size, settings.batching.max_batch_size))

    async def model_ready(request: Request) -> Response:
        name = BUNDLE_MODEL if names_bundle(request) else (await served(request)).card.name
        grant_of(request).require(Scope.INFER, Scope.ADMIN)
        doubt = service.doubt
        return JSONResponse({"name": name, "ready": True}) if doubt is None else refusal(503, doubt)

    async def list_models(request: Request) -> Response:
        return JSONResponse(repository_index(service, grant_of(request)))

    async def statistics(request: Request) -> Response:
        if "task" in request.path_params and names_bundle(request):
            return JSONResponse(bundle_statistics(service, grant_of(request)))
        task = await served(request) if "task" in request.path_params else None
        return JSONResponse(model_statistics(service, grant_of(request), task))

    async def load(request: Request) -> Response:
        await asyncio.to_thread(service.require_administration().load, grant_of(request), request.path_params["task"])
        return JSONResponse({})

    async def unload(request: Request) -> Response:
        await asyncio.to_thread(service.require_administration().unload, grant_of(request), request.path_params["task"])
        return JSONResponse({})

    app.add_api_route("/v2/models/stats", statistics, response_model=None)
    endpoint = inference_endpoint(service, infer)
    for model in _MODELS:
        hidden = "version" in model
        app.add_api_route(
            f"{model}/infer",
            endpoint,
            methods=["POST"],
            response_model=None,
            openapi_extra=_INFER_SCHEMA,
            include_in_schema=not hidden,
        )
        for suffix, handler in (("", metadata), ("/ready", model_ready), ("/config", config), ("/stats", statistics)):
            app.add_api_route(f"{model}{suffix}", handler, response_model=None, include_in_schema=not hidden)
    app.add_api_route("/v2", describe_server, response_model=None)
    app.add_api_route(LIVE_PATH, live, response_model=None)
    app.add_api_route(READY_PATH, ready, response_model=None)
    app.add_api_route("/v2/repository/index", list_models, methods=["POST"], response_model=None)
    for suffix, handler in (("load", load), ("unload", unload)):
        app.add_api_route(f"/v2/repository/models/{{task}}/{suffix}", handler, methods=["POST"], response_model=None)
    return tuple(HotRoute(f"{model}/infer", endpoint) for model in _MODELS)


def _is_soon_parsed(body: bytes, header_length: str | None) -> bool:
    """Tell whether parsing a body keeps nobody waiting."""
    if len(body) <= SMALL_BODY_BYTES:
        return True
    text = header_length or ""
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9
    return is_number and int(text) <= SMALL_BODY_BYTES and len(body) <= _SMALL_BINARY_BYTES


def _parse(
    body: bytes, header_length: str | None, image_size: int, settings: ServerSettings, inputs: Sequence[str]
) -> InferRequest:
    message = parse_message(
        body, header_length, max_json_bytes=settings.max_json_bytes, max_json_values=settings.max_json_values
    )
    return read_request(message, image_size=image_size, max_images=settings.max_images, inputs=inputs)


def _encode(
    parsed: InferRequest, model: tuple[str, str], answers: Sequence[Classified], accepted: str
) -> tuple[bytes, dict[str, str]]:
    """Return a response's body and its headers."""
    content, json_bytes = render_message(parsed, model, output_tensors(parsed, answers))
    headers = {} if json_bytes is None else {HEADER_LENGTH: str(json_bytes)}
    content, encoding = compress_for(accepted, content)
    return content, {**headers, **encoding}
