"""Turns at the work in front of the batcher, the budget, and what slow or hostile connections are answered."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import logging
import socket
import threading
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.errors import InputError, QueueFullError, SpecError
from vpdeploy.server.bodies import decompress
from vpdeploy.server.budget import MemoryBudget
from vpdeploy.server.forms import form_files
from vpdeploy.server.logs import Repetitions
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statuses import TooLargeError
from vpdeploy.server.work import Job, Turns, WorkPool
from vpdeploy.serving.batcher import BatchSettings

PREDICT = "/v1/tasks/rgb:predict"


def job(line: str) -> Job:
    return Job(line, lambda: None, lambda result, failure: None)


def test_the_line_that_has_used_the_least_goes_next():
    turns = Turns()
    for _ in range(6):
        turns.append(job("flooded"))
    for _ in range(3):
        turns.append(job("cheap"))
    order = []
    while (taken := turns.pop(most_running=9)) is not None:
        order.append(taken.line)
        turns.charge(taken.line, 3.0 if taken.line == "flooded" else 1.0)
    # 3 s each of one, then 3 jobs of 1 s of the other: the flood pays for what its images cost.
    assert order == ["flooded", "cheap", "cheap", "cheap", "flooded", "flooded", "flooded", "flooded", "flooded"]


def test_a_line_that_comes_late_has_saved_up_no_turns():
    turns = Turns()
    for _ in range(4):
        turns.append(job("old"))
    for _ in range(2):
        turns.charge(turns.pop(most_running=9).line, 10.0)
    for _ in range(3):
        turns.append(job("new"))
    order = []
    for _ in range(4):
        order.append(turns.pop(most_running=9).line)
        turns.charge(order[-1], 10.0)
    assert sorted(order[:2]) == sorted(order[2:]) == ["new", "old"]


def test_no_line_may_run_more_than_its_threads():
    turns = Turns()
    for _ in range(3):
        turns.append(job("flooded"))
    assert [turns.pop(most_running=2).line for _ in range(2)] == ["flooded"] * 2
    assert turns.pop(most_running=2) is None
    turns.append(job("other"))
    assert turns.pop(most_running=2).line == "other"
    turns.charge("flooded", 1.0)
    assert turns.pop(most_running=2).line == "flooded"


def test_a_flooded_line_is_refused_while_others_are_not():
    async def flood() -> None:
        release = threading.Event()
        pool = WorkPool(threads=1, max_pending=8)
        try:
            running = [pool.submit("flooded", release.wait)]
            await asyncio.to_thread(until, lambda: len(pool._turns) == 0)
            running += [pool.submit("flooded", release.wait) for _ in range(4)]
            with pytest.raises(QueueFullError, match="4 of this task"):
                pool.submit("flooded", release.wait)
            # Another line has a thread at once.
            assert await asyncio.wait_for(pool.submit("other", lambda: 7), TIMEOUT_S) == 7
            running[-1].cancel()
            await asyncio.sleep(0)
            running[-1] = pool.submit("flooded", release.wait)
            release.set()
            assert await asyncio.gather(*running) == [True] * 5
        finally:
            release.set()
            pool.close()

    asyncio.run(flood())


def test_a_task_that_floods_the_queue_is_refused_while_others_are_not(toy_bundle):
    settings = ServerSettings(batching=BatchSettings(max_batch_size=1, max_delay_ms=0, max_queue_size=4))
    with serving_gated(toy_bundle, settings) as (server, gate), ThreadPoolExecutor(8) as pool:

        def ask(task: str) -> int:
            return httpx.post(f"{server.url}/v1/tasks/{task}:predict", content=encoded("red"), timeout=60).status_code

        asked = [pool.submit(ask, "rgb")]
        gate.wait_until_running()
        asked.append(pool.submit(ask, "rgb"))  # it is staged
        until(lambda: server.service.batcher._staged is not None)
        asked += [pool.submit(ask, "rgb") for _ in range(4)]
        until(lambda: server.metric("vpdeploy_queue_images") == 4)
        assert ask("rgb") == 429
        asked += [pool.submit(ask, "bgr") for _ in range(2)]
        until(lambda: server.metric("vpdeploy_queue_images") == 6)
        assert ask("bgr") == 429  # its half of 4 waits
        gate.permit(20)
        assert [each.result(TIMEOUT_S) for each in asked] == [200] * 8


def test_a_failed_job_holds_nothing_of_its_request():
    class Body:
        pass

    async def fail() -> None:
        pool = WorkPool(threads=1, max_pending=8)
        body = Body()
        gone = weakref.ref(body)

        def work(body: Body) -> None:
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise InputError("outer") from error

        failing = pool.submit("line", partial(work, body))
        del body
        gc.disable()  # what only the collection of cycles would free does not count
        try:
            with pytest.raises(InputError, match="outer"):
                await failing
            await asyncio.to_thread(pool.close)
            assert gone() is None
        finally:
            gc.enable()

    asyncio.run(fail())


def test_a_budget_has_room_for_others_beside_a_greedy_client():
    budget = MemoryBudget(total_bytes=100, client_bytes=75)
    with budget.reserve("greedy") as greedy, budget.reserve("other") as other:
        greedy.grow(70)
        with pytest.raises(QueueFullError, match="share of 75"):
            greedy.grow(6)
        other.grow(25)
        with pytest.raises(QueueFullError, match="accepted 100 bytes"):
            other.grow(6)
        with pytest.raises(TooLargeError, match="may hold 75"):
            other.grow(76)
        greedy.shrink(30)
        other.grow(6)
        assert budget.held_bytes == 71
    assert budget.held_bytes == 0
    with pytest.raises(QueueFullError, match="ended"):  # what a thread of an ended request would still take
        other.grow(1)
    other.shrink(1)
    assert budget.held_bytes == 0


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_inflating_never_holds_more_than_it_reserved(compress):
    plain = bytes(range(256)) * 40_000
    budget = MemoryBudget(total_bytes=5 << 20, client_bytes=5 << 20)
    name = "gzip" if compress is gzip.compress else "deflate"
    with budget.reserve("x") as reservation, pytest.raises(QueueFullError):
        decompress(compress(plain), name, 64 << 20, reservation)
    assert budget.held_bytes == 0
    budget = MemoryBudget(total_bytes=11 << 20, client_bytes=11 << 20)
    with budget.reserve("x") as reservation:
        assert decompress(compress(plain), name, 64 << 20, reservation) == plain
        assert budget.held_bytes == len(plain)


def test_a_form_with_a_preamble_and_boundaries_that_are_none():
    content = b"\r\n--" * 1000 + b"\r\n-x"
    body = b"read me\r\n--b\r\nContent-Disposition: form-data; name=i; filename=a.png\r\n\r\n" + content + b"\r\n--b--"
    assert form_files("multipart/form-data; boundary=b", body, max_files=1) == [("a.png", content)]


@pytest.mark.parametrize("head", [b"", b"A: b", b"Content-Disposition: form-data; filename=a", b"A: " + b"b" * 20_000])
def test_a_part_without_a_name_is_refused(head):
    body = b"--b\r\n" + head + b"\r\n\r\n1\r\n--b--"
    with pytest.raises(InputError, match="not a valid form"):
        form_files("multipart/form-data; boundary=b", body, max_files=1)


def talk(server, data: bytes) -> bytes:
    """Send bytes and return all that is answered until the server hangs up."""
    with socket.create_connection(server.address.split(":"), timeout=TIMEOUT_S) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:  # it hung up while we were still sending
            pass
        return answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 40_000,
    ],
)
def test_a_large_head_is_refused_before_anything_is_asked(toy_server, head):
    answer = talk(toy_server, head)
    assert answer[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_head_of_ordinary_size_in_small_pieces_is_served(toy_server):
    head = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"
    with socket.create_connection(toy_server.address.split(":"), timeout=TIMEOUT_S) as connection:
        for start in range(0, len(head), 1000):
            connection.sendall(head[start : start + 1000])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"GET /v2 HT", b"408"),
        (b"POST /v1/tasks/rgb:predict HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + bytes(1000), b"408"),
    ],
)
def test_a_client_that_stalls_is_hung_up_on_and_frees_its_share(toy_bundle, sent, status):
    settings = ServerSettings(header_timeout_s=0.05, body_timeout_s=0.05)
    with load(toy_bundle) as session, serving(session, settings) as server:
        assert talk(server, sent)[9:12] == status
        until(lambda: server.metric("vpdeploy_body_bytes") == 0)
        assert httpx.post(f"{server.url}{PREDICT}", content=encoded("red")).status_code == 200


def test_a_request_that_waits_for_its_answer_is_not_hung_up_on(toy_bundle):
    settings = ServerSettings(header_timeout_s=0.05, body_timeout_s=0.05)
    answers = []
    with serving_gated(toy_bundle, settings) as (server, gate):
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}{PREDICT}", content=encoded("red"), timeout=TIMEOUT_S)
            )
        )
        asking.start()
        gate.wait_until_running()
        ticks = []
        connection = next(iter(server.server.server_state.connections))
        check = connection.check
        connection.check = lambda: (ticks.append(1), check())[1]
        until(lambda: len(ticks) >= 2)
        gate.permit(10)
        asking.join(TIMEOUT_S)
    assert answers[0].status_code == 200


def test_an_image_that_decodes_to_more_than_a_client_may_hold_is_refused(toy_bundle):
    settings = ServerSettings(max_client_bytes=1_000_000)
    with load(toy_bundle) as session, serving(session, settings) as server:
        small, large = (encoded("red", side=side) for side in (300, 600))
        assert httpx.post(f"{server.url}{PREDICT}", content=small).status_code == 200
        refused = httpx.post(f"{server.url}{PREDICT}", content=large)
        assert refused.status_code == 413
        assert "1000000" in refused.json()["error"]
        assert server.metric("vpdeploy_body_bytes") == 0


def test_json_of_very_many_values_is_refused_before_it_is_parsed(client):
    body = b'{"inputs":[' + b"[]," * 400_000 + b"[]]}"
    refused = client.post("/v2/models/rgb/infer", content=body)
    assert refused.status_code == 413
    assert "send images as binary data" in refused.json()["error"]


def test_a_redirect_names_no_host(client):
    response = client.get("/v1/tasks/", headers={"host": "evil.example"})
    assert response.status_code == 307
    assert response.headers["location"] == "/v1/tasks"


def test_a_made_up_task_is_echoed_short_and_on_one_line(client):
    message = client.post(f"/v1/tasks/{'a' * 500}%0a%1b:predict", content=encoded("red")).json()["error"]
    assert len(message) < 120
    assert message.isprintable()


def test_lines_of_one_kind_are_counted_once_there_are_many():
    now = [0.0]
    repetitions = Repetitions(most=2, period_s=10, clock=lambda: now[0])

    def show(text: str, *values: object) -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "file", 1, text, values, None)
        return record.getMessage() if repetitions.filter(record) else None

    assert [show("bad image %d", index) for index in range(4)] == ["bad image 0", "bad image 1", None, None]
    assert show("another") == "another"
    now[0] = 12.0
    assert show("bad image %d", 5) == "bad image 5 (and 2 more lines like the ones before in 12 s)"
    assert show("bad image %d", 6) == "bad image 6"


@pytest.mark.parametrize("name", ["max_client_bytes", "max_json_values", "header_timeout_s", "body_timeout_s"])
def test_limits_are_more_than_nothing(name):
    with pytest.raises(SpecError, match=name):
        ServerSettings(**{name: 0})
