"""Queues, deadlines and clients that leave, with batches that run when the test permits it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import encoded, solid
from tritonclient.utils import InferenceServerException

from vpdeploy import load
from vpdeploy.errors import BackendError
from vpdeploy.server.settings import ServerSettings
from vpdeploy.serving.batcher import BatchSettings

PREDICT = "/v1/tasks/rgb:predict"


def settings(**fields) -> ServerSettings:
    return ServerSettings(batching=BatchSettings(**{"max_batch_size": 8, "max_delay_ms": 0, **fields}))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def ask(url: str, **options) -> httpx.Response:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        return client.post(PREDICT, content=encoded("red"), **options)


def test_a_full_queue_answers_429_and_says_when_to_come_back(toy_bundle, pool):
    with serving_gated(toy_bundle, settings(max_queue_size=3)) as (server, gate):
        first = pool.submit(ask, server.url)
        gate.wait_until_running()
        queued = [pool.submit(ask, server.url) for _ in range(3)]
        until(lambda: server.metric("vpdeploy_queue_images") == 3)
        refused = ask(server.url)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "3 images wait already" in refused.json()["error"]
        gate.permit(10)
        assert [each.result().status_code for each in [first, *queued]] == [200] * 4
        assert ask(server.url).status_code == 200
        assert server.metric("vpdeploy_requests_total", task="rgb", status="429") == 1


def test_a_request_for_several_images_is_refused_whole(toy_bundle, pool):
    with serving_gated(toy_bundle, settings(max_queue_size=3)) as (server, gate):
        first = pool.submit(ask, server.url)
        gate.wait_until_running()
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
            files = [("image", ("a.png", encoded("red")))]
            second = pool.submit(ask, server.url)
            until(lambda: server.metric("vpdeploy_queue_images") == 1)
            assert client.post(PREDICT, files=files * 3).status_code == 429
            assert server.metric("vpdeploy_queue_images") == 1
            assert client.post(PREDICT, files=files * 4).status_code == 400
        gate.permit(10)
        assert first.result().status_code == second.result().status_code == 200


def test_a_passed_deadline_answers_504_and_the_image_never_runs(toy_bundle, pool):
    with serving_gated(toy_bundle, settings()) as (server, gate):
        first = pool.submit(ask, server.url)
        gate.wait_until_running()
        late = ask(server.url, params={"deadline_ms": 20})
        assert late.status_code == 504
        assert "deadline" in late.json()["error"]
        assert server.metric("vpdeploy_queue_images") == 0
        gate.permit(10)
        assert first.result().status_code == 200
        assert gate.batch_sizes == [1]


def test_the_default_deadline_ends_a_batch_that_hangs(toy_bundle):
    with serving_gated(toy_bundle, settings(deadline_ms=20)) as (server, gate):
        assert ask(server.url).status_code == 504
        gate.permit(10)


def test_tritonclients_timeout_is_a_deadline_in_microseconds(toy_bundle, pool):
    with serving_gated(toy_bundle, settings()) as (server, gate):
        first = pool.submit(ask, server.url)
        gate.wait_until_running()
        tensor = triton.InferInput("image", [1, 16, 16, 3], "UINT8").set_data_from_numpy(solid("red")[np.newaxis])
        with (
            triton.InferenceServerClient(server.address) as client,
            pytest.raises(InferenceServerException) as late,
        ):
            client.infer("rgb", [tensor], timeout=20_000)
        assert late.value.status() == "504"
        gate.permit(10)
        assert first.result().status_code == 200


def test_a_client_that_leaves_frees_its_place(toy_bundle, pool):
    image = encoded("red")
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n".encode()
    with serving_gated(toy_bundle, settings(max_queue_size=1)) as (server, gate):
        first = pool.submit(ask, server.url)
        gate.wait_until_running()
        with socket.create_connection(server.address.split(":"), timeout=TIMEOUT_S) as leaving:
            leaving.sendall(head + image)
            until(lambda: server.metric("vpdeploy_queue_images") == 1)
        until(lambda: server.metric("vpdeploy_queue_images") == 0)
        until(lambda: server.metric("vpdeploy_requests_total", task="rgb", status="499") == 1)
        next_one = pool.submit(ask, server.url)
        until(lambda: server.metric("vpdeploy_queue_images") == 1)
        gate.permit(10)
        assert first.result().status_code == next_one.result().status_code == 200
        assert gate.batch_sizes == [1, 1]


def test_a_client_that_leaves_while_sending_leaves_nothing_behind(toy_bundle):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    with load(toy_bundle) as session, serving(session) as server:
        with socket.create_connection(server.address.split(":"), timeout=TIMEOUT_S) as leaving:
            leaving.sendall(head + bytes(500))
            until(lambda: server.metric("vpdeploy_body_bytes") == 500)
        until(lambda: server.metric("vpdeploy_body_bytes") == 0)
        assert server.metric("vpdeploy_requests_total", task="rgb", status="499") == 1
        assert ask(server.url).status_code == 200


def test_a_fan_out_runs_as_one_batch(toy_bundle):
    with serving_gated(toy_bundle, settings(max_delay_ms=50)) as (server, gate):
        gate.permit(10)
        response = httpx.post(f"{server.url}/v1/predict", content=encoded("blue"))
        assert len(response.json()["tasks"]) == 3
        assert gate.batch_sizes == [3]
        assert server.metric("vpdeploy_batch_tasks_sum") == 3


def test_a_failing_runtime_answers_500_in_one_line_and_the_server_goes_on(toy_bundle, caplog):
    with serving_gated(toy_bundle, settings()) as (server, gate):
        gate.permit(10)
        run = gate.run

        def fail_once(images, slots):
            gate.run = run
            raise BackendError("the device is\nlost")

        gate.run = fail_once
        failed = ask(server.url)
        assert (failed.status_code, failed.json()) == (500, {"error": "the device is lost"})
        assert ask(server.url).status_code == 200
        assert "the device is lost" in caplog.text


def test_an_unexpected_error_shows_the_client_nothing(toy_bundle, caplog):
    with serving_gated(toy_bundle, settings()) as (server, gate):
        gate.permit(10)
        server.service.classify = None
        failed = ask(server.url)
        assert failed.json() == {"error": "internal error; the server's log says more"}
        assert failed.status_code == 500
        assert "TypeError" in caplog.text


def test_logits_that_are_not_finite_are_an_error(toy_bundle):
    with serving_gated(toy_bundle, settings()) as (server, gate):
        gate.run = lambda images, slots: np.full((len(images), 3), np.nan, np.float32)
        failed = ask(server.url)
        assert failed.status_code == 500
        assert "not finite" in failed.json()["error"]
