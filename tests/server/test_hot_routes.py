from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from urllib.parse import urlsplit

import httpx
import pytest
from server.running import TIMEOUT_S, RunningServer, serving_gated, until
from server.toy_bundle import encoded

from vpdeploy.server.hot_routes import HotRoute, HotRoutes
from vpdeploy.server.mailbox import running_mailbox


async def nobody(request):
    raise AssertionError("not asked")


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/v2/models/rgb/infer", {"task": "rgb"}),
        ("/v2/models/rose garden/infer", {"task": "rose garden"}),
        ("/v2/models/rgb/versions/2/infer", None),
        ("/v2/models//infer", None),
        ("/v2/models/rgb/infer/", None),
        ("/v1/models/rgb/infer", None),
        ("x/v2/models/rgb/infer", None),
    ],
)
def test_a_hot_route_takes_the_paths_that_the_framework_takes(path, parameters):
    assert HotRoute("/v2/models/{task}/infer", nobody).parameters(path) == parameters


def test_what_is_no_post_to_a_hot_route_goes_to_the_framework():
    seen = []

    async def framework(scope, receive, send):
        seen.append((scope["method"], scope["path"]))

    app = HotRoutes(framework, routes=(HotRoute("/v2/models/{task}/infer", nobody),))
    for method, path in (("GET", "/v2/models/rgb/infer"), ("POST", "/v2/models/rgb"), ("POST", "/v1/predict")):
        asyncio.run(app({"type": "http", "method": method, "path": path, "root_path": ""}, None, None))
    assert seen == [("GET", "/v2/models/rgb/infer"), ("POST", "/v2/models/rgb"), ("POST", "/v1/predict")]


def test_hot_routes_are_described_and_refuse_other_methods(client: httpx.Client):
    paths = client.get("/openapi.json").json()["paths"]
    assert "post" in paths["/v2/models/{task}/infer"]
    assert "post" in paths["/v1/tasks/{task}:predict"]
    assert client.get("/v2/models/rgb/infer").status_code == 405
    assert client.get("/v1/tasks/rgb:predict").status_code == 405


def test_head_and_body_of_an_answer_arrive_together_also_where_the_client_waits_for_the_go_ahead(
    toy_server: RunningServer,
):
    body = encoded("red")
    address = urlsplit(toy_server.url)
    with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(
            b"POST /v1/tasks/rgb:predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        answer = connection.recv(10_000)
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b'"label":"red"' in rest


def test_a_client_that_leaves_is_noticed_while_its_image_waits(toy_bundle):
    with serving_gated(toy_bundle) as (server, gate):
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S) as connection:
            body = encoded("red")
            head = b"POST /v1/tasks/rgb:predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            gate.wait_until_running()
        until(lambda: server.metric("vpdeploy_requests_total", task="rgb", status="499") == 1)


def test_calls_of_many_threads_are_all_made_on_the_loop_in_each_threads_order():
    made: list[tuple[int, int]] = []
    loop_thread = []

    def make(number: int, call: int) -> None:
        loop_thread.append(threading.get_ident())
        made.append((number, call))

    async def main() -> None:
        mailbox = running_mailbox()
        assert running_mailbox() is mailbox
        done = asyncio.get_running_loop().create_future()

        def post_all(number: int) -> None:
            for call in range(500):
                mailbox.post(make, number, call)
            mailbox.post(lambda: len(made) == 2000 and not done.done() and done.set_result(None))

        threads = [threading.Thread(target=post_all, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(done, TIMEOUT_S)
        for thread in threads:
            thread.join(TIMEOUT_S)

    asyncio.run(main())
    assert set(loop_thread) == {threading.get_ident()}
    for number in range(4):
        assert [call for each, call in made if each == number] == list(range(500))


def test_a_mailbox_outlives_its_loop_harmlessly_and_holds_it_not():
    async def main():
        return running_mailbox(), weakref.ref(asyncio.get_running_loop())

    mailbox, loop = asyncio.run(main())
    mailbox.post(print, "never")
    gc.collect()
    assert loop() is None
    mailbox.post(print, "never")
