"""What all inference endpoints share: errors become responses, requests are counted, and clients may leave."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from vpdeploy.server.access import Scope
from vpdeploy.server.auth import grant_of
from vpdeploy.server.metrics import REMOVED_TASK, SEVERAL_TASKS, UNKNOWN_TASK
from vpdeploy.server.service import Service
from vpdeploy.server.statistics import WHOLE
from vpdeploy.server.statuses import ClientGoneError, error_response
from vpdeploy.server.work import forget_frames

_T = TypeVar("_T")

_UNWATCHED_S = 0.02
"""How long a client may be gone before it is noticed, in s; most requests are answered by then."""

Handler = Callable[[Request], Awaitable[Response]]


def inference_endpoint(service: Service, handler: Handler) -> Handler:
    """Wrap a handler: whatever it raises becomes an error response, and the request is counted."""

    async def endpoint(request: Request) -> Response:
        started = time.perf_counter()
        try:
            grant_of(request).require(Scope.INFER)  # before the body is read
            response = await handler(request)
        except Exception as error:  # an inference request is always answered
            response = error_response(error)
            forget_frames(error)
        service.metrics.count_request(
            task=_task_label(service, request, response),
            status=response.status_code,
            seconds=time.perf_counter() - started,
        )
        return response

    return endpoint


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await ``work``, and cancel it if the client closes the connection; the request's body must have been read.

    Raises:
        ClientGoneError: The client left first.
    """
    asking = asyncio.current_task()
    assert asking is not None
    leaving: asyncio.Future[None] | None = None
    has_left = False

    def stop(_: object) -> None:
        nonlocal has_left
        has_left = True
        asking.cancel()

    def watch() -> None:
        nonlocal leaving
        leaving = asyncio.ensure_future(_client_left(request))
        leaving.add_done_callback(stop)

    # Neither the work nor, at first, the watch is a task of its own: each would take a tenth of what a request takes.
    watching = asyncio.get_running_loop().call_later(_UNWATCHED_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        if sys.version_info >= (3, 11):
            asking.uncancel()
        raise ClientGoneError("the client left before its answer was ready") from None
    finally:
        watching.cancel()
        if leaving is not None:
            leaving.remove_done_callback(stop)
            leaving.cancel()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _task_label(service: Service, request: Request, response: Response) -> str:
    """Return a label that clients cannot multiply: only names of loaded tasks become one."""
    task = request.path_params.get("task")
    if task is None or task == WHOLE[0]:
        return SEVERAL_TASKS
    if task in service.session.tasks:
        return str(task)
    return REMOVED_TASK if response.status_code == 200 else UNKNOWN_TASK  # it was removed while it answered
