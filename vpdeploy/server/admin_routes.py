"""The administration over HTTP: publish, withdraw, roll back and list the tasks of the bundle."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vpdeploy.errors import InputError
from vpdeploy.format.bundle import Condition
from vpdeploy.server.access import Scope
from vpdeploy.server.administration import Administration
from vpdeploy.server.archives import read_archive
from vpdeploy.server.auth import grant_of
from vpdeploy.server.bodies import BodyReader, client_of
from vpdeploy.server.image_routes import TASK_PARAMETER, TASK_PATH
from vpdeploy.server.service import Service

_VERSION = re.compile(r'(?P<quote>"?)([0-9]{1,9})(?P=quote)')
_MAX_CONDITION = 1000

_CONDITIONS: list[dict[str, Any]] = [
    {
        "name": "If-Match",
        "in": "header",
        "description": "Versions of which one must be served, as '\"3\"'; * for any.",
        "schema": {"type": "string", "pattern": r'^(\*|"[0-9]{1,9}"(, "[0-9]{1,9}")*)$', "maxLength": 1000},
    }
]
_ARCHIVE: dict[str, Any] = {
    "required": True,
    "content": {
        media_type: {"schema": {"type": "string", "format": "binary"}}
        for media_type in ("application/x-tar", "application/gzip", "application/zip", "application/octet-stream")
    },
}


def add_admin_routes(app: FastAPI, service: Service, bodies: BodyReader, administration: Administration) -> None:
    """Add the administration's routes to an app."""

    async def publish(request: Request) -> Response:
        grant, client = grant_of(request), client_of(request)
        grant.require(Scope.ADMIN)  # before the body is read
        task, line = request.path_params["task"], f"client {client}"
        condition = _condition(request)
        with service.budget.reserve(client) as reservation:
            async with bodies.body(request, line=line) as body:
                read = partial(read_archive, body, reservation, max_bytes=service.settings.max_body_bytes)
                files = await service.off_loop(line, read)
            version = await asyncio.to_thread(administration.publish, grant, task, files, condition=condition)
        return _changed(task, version)

    async def withdraw(request: Request) -> Response:
        task = request.path_params["task"]
        withdraw = partial(administration.withdraw, grant_of(request), task, condition=_condition(request))
        return JSONResponse({"task": task, "versions": await asyncio.to_thread(withdraw)})

    async def roll_back(request: Request) -> Response:
        task = request.path_params["task"]
        roll_back = partial(administration.roll_back, grant_of(request), task, condition=_condition(request))
        return _changed(task, await asyncio.to_thread(roll_back))

    async def list_versions(request: Request) -> Response:
        tasks = await asyncio.to_thread(administration.tasks, grant_of(request))
        return JSONResponse(
            {"tasks": [{"task": name, "versions": list(map(asdict, kept))} for name, kept in tasks.items()]}
        )

    for path, handler, method, summary, body in (
        (TASK_PATH, publish, "PUT", "Publish a task, or a new version of it", {"requestBody": _ARCHIVE}),
        (TASK_PATH, withdraw, "DELETE", "Withdraw a task and its versions", {}),
        (f"{TASK_PATH}:rollback", roll_back, "POST", "Serve a task's previous version again", {}),
    ):
        app.add_api_route(
            path,
            handler,
            methods=[method],
            response_model=None,
            summary=summary,
            openapi_extra={"parameters": [TASK_PARAMETER, *_CONDITIONS], **body},
        )
    app.add_api_route("/v1/versions", list_versions, response_model=None, summary="List all versions that are kept")


def _changed(task: str, version: int) -> Response:
    return JSONResponse({"task": task, "version": version}, headers={"ETag": f'"{version}"'})


def _condition(request: Request) -> Condition | None:
    """Return what a request says the version must be (RFC 9110, 13.1): ``If-Match``, or that there must be none yet.

    Raises:
        InputError: The headers are no such conditions.
    """
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match is not None:
        if none_match.strip() != "*" or match is not None:
            raise InputError("If-None-Match should be *, without If-Match: the task must not be there yet")
        return lambda version: version is None
    if match is None:
        return None
    if match.strip() == "*":
        return lambda version: version is not None
    found = [_VERSION.fullmatch(tag.strip()) for tag in match[:_MAX_CONDITION].split(",")]
    versions = {int(tag[2]) for tag in found if tag is not None}
    if None in found:
        raise InputError('If-Match should be * or versions, as "3"')
    return lambda version: version in versions
