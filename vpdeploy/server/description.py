"""The API's description for machines, ``/openapi.json``: beside the routes, every status that an error may have."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_MEANINGS = {
    400: "The request cannot be used.",
    401: "The token is missing or unknown.",
    403: "The token is not good for this, or the request comes from a page of another site.",
    404: "There is no such task or version, or it does not exist for the token.",
    408: "The request took too long to arrive.",
    409: "The task does not fit the bundle.",
    412: "The task is at another version than the request says.",
    413: "The request is larger than is accepted.",
    421: "The request names another host.",
    422: "The compiled task does not answer as the trained one.",
    429: "There is too much work already, or too much of this client's.",
    431: "The request's head is larger than is accepted.",
    500: "The runtime failed, or the bundle is damaged.",
    501: "This installation cannot do it.",
    503: "The server is shutting down or not well.",
    504: "The deadline passed.",
    507: "The disk is full.",
}
"""What each status means; the table of statuses gives them."""

_ALWAYS = (400, 401, 403, 408, 421, 431, 500, 503)
_WITH_TASK = (404,)
_WITH_BODY = (413, 429)
_ASKING = (404, 413, 429, 504)
_CHANGING = (404, 409, 412, 413, 422, 429, 501, 507)

_CHANGES = (":rollback", "/load", "/unload")
_QUESTIONS = ("predict", "/infer")

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "What was expected and what was found, in one line."}},
}
_TASK_SCHEMA = {"type": "string"}


def describe(app: FastAPI, *, is_guarded: bool, open_paths: frozenset[str]) -> None:
    """Complete an app's description of itself.

    Args:
        app: The app, with all its routes.
        is_guarded: Whether requests need a token.
        open_paths: Paths that never need one.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {})["Error"] = _ERROR_SCHEMA
            if is_guarded:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"token": []}]
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    _complete(path, method, operation)
                    if is_guarded and path in open_paths:
                        operation["security"] = []
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    """Add to one operation the parameters of its path and the statuses of its errors."""
    parameters = operation.setdefault("parameters", [])
    named = {each["name"] for each in parameters}
    for name in ("task", "version"):
        if f"{{{name}}}" in path and name not in named:
            parameters.append({"name": name, "in": "path", "required": True, "schema": _TASK_SCHEMA})
    if path.endswith("/infer"):
        operation["responses"]["200"]["content"]["application/octet-stream"] = {}
    for status in _statuses(path, method, operation):
        operation["responses"].setdefault(
            str(status),
            {
                "description": _MEANINGS[status],
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        )


def _statuses(path: str, method: str, operation: dict[str, Any]) -> list[int]:
    found = set(_ALWAYS)
    if "{" in path:
        found.update(_WITH_TASK)
    if "requestBody" in operation:
        found.update(_WITH_BODY)
    if path.endswith(_QUESTIONS):
        found.update(_ASKING)
    if method in ("put", "delete") or path.endswith(_CHANGES):
        found.update(_CHANGING)
    return sorted(found)
