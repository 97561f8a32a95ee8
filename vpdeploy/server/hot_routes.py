"""The routes that carry the load, answered without the framework: it would take longer over a request than we do."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from vpdeploy.server.endpoint import Handler


class HotRoute:
    """A path that takes ``POST``.

    Args:
        path: As the framework takes it, e.g. ``/v2/models/{task}/infer``.
        endpoint: Answers a request, whatever it is; it raises nothing.
    """

    def __init__(self, path: str, endpoint: Handler) -> None:
        self.path = path
        self.endpoint = endpoint
        self._pattern = compile_path(path)[0]
        self._prefix = path.partition("{")[0]

    def parameters(self, path: str) -> dict[str, str] | None:
        """Return the parameters in a request's path; None where it is another route's."""
        if not path.startswith(self._prefix):
            return None
        found = self._pattern.match(path)
        return None if found is None else found.groupdict()


class HotRoutes:
    """ASGI middleware that answers hot routes itself. What guards the others, stands before it and guards these, too.

    The framework knows the same endpoints, and describes them; it answers every other method and path.

    Args:
        app: Answers all else.
        routes: The hot routes; the first that matches answers.
    """

    def __init__(self, app: ASGIApp, *, routes: tuple[HotRoute, ...]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            for route in self._routes:
                parameters = route.parameters(scope["path"])
                if parameters is not None:
                    scope["path_params"], scope["route"] = parameters, route
                    response = await route.endpoint(Request(scope, receive))
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)
