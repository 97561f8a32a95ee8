"""The app: routes, limits and lifetime of one server, put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match

import vpdeploy
from vpdeploy.errors import VpdeployError
from vpdeploy.server.access import Scope
from vpdeploy.server.access_log import RequestTrail
from vpdeploy.server.admin_routes import add_admin_routes
from vpdeploy.server.auth import Guard, grant_of
from vpdeploy.server.bodies import BodyReader
from vpdeploy.server.description import describe
from vpdeploy.server.hosts import HostCheck
from vpdeploy.server.hot_routes import HotRoutes
from vpdeploy.server.image_routes import add_image_routes
from vpdeploy.server.oip_routes import LIVE_PATH, READY_PATH, add_oip_routes
from vpdeploy.server.origin import SameOrigin
from vpdeploy.server.playground_routes import PLAYGROUND_PATHS, add_playground_routes
from vpdeploy.server.redirects import RelativeRedirects
from vpdeploy.server.service import ServedSession, Service
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statuses import error_response
from vpdeploy.server.tracing import Tracing
from vpdeploy.server.watch import BundleWatcher, log_failures

if TYPE_CHECKING:  # an extra of its own
    from vpdeploy.server.grpc_server import GrpcServer

_METHOD_NOT_ALLOWED = 405

_OPEN_PATHS = frozenset((LIVE_PATH, READY_PATH))
"""What anybody may ask."""

CLOSE_S = 3.0
"""How long the threads may take to end once no request is left."""

CLOSE_AFTER_FAULT_S = 0.5
"""The same where one of them is known to hang, or to be gone."""


def create_app(
    session: ServedSession,
    settings: ServerSettings | None = None,
    *,
    grpc_server: GrpcServer | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Build the app that serves a session.

    Its threads stop when the app's lifespan ends; until then ``app.state.service`` is the ``Service`` behind it.

    Args:
        session: An open session; the caller closes it after the app's lifespan.
        settings: What is accepted, and how much of it at a time.
        grpc_server: Answers over gRPC for as long as the app runs.
        tracing: Where spans of requests go; the caller closes it after the app's lifespan.
    """
    settings = settings or ServerSettings()
    service = Service(session, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log_failures(session.failures)
        watcher = None
        if settings.watch is not None:
            watcher = BundleWatcher(
                session.sync,
                settings.watch,
                interval_s=settings.watch_interval_s,
                on_failure=service.metrics.count_failed_sync,
                told=session.failures,
            )
            watcher.start()
        if grpc_server is not None:
            grpc_server.start(service)
        service.watchdog.start()
        beating = asyncio.create_task(service.beat())
        try:
            yield
        finally:
            beating.cancel()
            patience_s = CLOSE_S if service.watchdog.fault is None else CLOSE_AFTER_FAULT_S
            closing = [partial(service.close, timeout_s=patience_s)]
            if watcher is not None:
                closing.append(partial(watcher.close, timeout_s=patience_s))
            if grpc_server is not None:
                grpc_server.stop(0)
                closing.append(partial(grpc_server.join, patience_s))
            service.is_closed = all(await asyncio.gather(*map(asyncio.to_thread, closing)))

    app = FastAPI(title="vpdeploy", version=vpdeploy.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.grpc_server = grpc_server
    bodies = BodyReader(max_body_bytes=settings.max_body_bytes, budget=service.budget, pool=service.pool)
    hot_routes = (*add_oip_routes(app, service, bodies), *add_image_routes(app, service, bodies))
    add_playground_routes(app, service)
    if service.administration is not None:
        add_admin_routes(app, service, bodies, service.administration)

    async def metrics(request: Request) -> Response:
        grant_of(request).require(Scope.METRICS)
        content, media_type = service.metrics.render()
        return Response(content, media_type=media_type)

    app.add_api_route(
        "/metrics",
        metrics,
        response_model=None,
        response_class=PlainTextResponse,
        summary="Metrics for Prometheus",
    )
    describe(app, is_guarded=not service.access.is_open, open_paths=_OPEN_PATHS)
    app.add_exception_handler(VpdeployError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_middleware(RelativeRedirects)
    app.add_middleware(HotRoutes, routes=hot_routes)
    app.add_middleware(SameOrigin)
    # The one added last comes first.
    app.add_middleware(Guard, access=service.access, open_paths=_OPEN_PATHS | PLAYGROUND_PATHS)
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts, open_paths=_OPEN_PATHS)
    app.add_middleware(RequestTrail, access_log=settings.access_log, tracing=tracing)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == _METHOD_NOT_ALLOWED:
        # The framework names the methods of the first route of this path only.
        found = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
        methods = {method for route in found for method in getattr(route, "methods", None) or ()}
        error.headers = {"Allow": ", ".join(sorted(methods))}
    return error_response(error)
