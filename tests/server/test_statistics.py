"""The account of requests by task and version, under the names that Triton gives it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import encoded, prompt_set, solid, write_toy_bundle

from vpdeploy import load
from vpdeploy.errors import (
    BackendError,
    DeadlineExceededError,
    InputError,
    QueueFullError,
    ShuttingDownError,
)
from vpdeploy.format.bundle import publish_task, withdraw_task
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.statistics import FailureReason, Statistics, TaskStatistics
from vpdeploy.serving.batch import BatchReport
from vpdeploy.serving.batcher import BatchSettings

TRITON_COUNTERS = (
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
)


def account(server, task: str) -> TaskStatistics:
    return next(each for each in server.service.statistics.read() if each.task == task)


def triton_samples(text: str) -> dict[str, dict[tuple[str, str], float]]:
    samples: dict[str, dict[tuple[str, str], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("nv_"):
                model = (sample.labels["model"], sample.labels["version"])
                # The parser adds a suffix that Triton's counters do not have; the test below looks at the text.
                values = samples.setdefault(sample.name.removesuffix("_total"), {})
                values[model] = values.get(model, 0.0) + sample.value
    return samples


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError("full"), "REJECTED"),
        (DeadlineExceededError("late"), "REJECTED"),
        (ShuttingDownError("closing"), "REJECTED"),
        (BackendError("broken"), "BACKEND"),
        (InputError("no image"), "OTHER"),
        (asyncio.CancelledError(), "CANCELED"),
    ],
)
def test_failures_have_tritons_reasons(error, reason):
    assert FailureReason.of(error).value == reason


def test_a_request_is_counted_once_for_each_task_and_its_images_once_each(toy_bundle):
    with (
        load(toy_bundle) as session,
        serving(session) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        files = [("image", ("a.png", encoded("red")))]
        assert client.post("/v1/tasks/rgb:predict", files=files * 3).status_code == 200
        assert client.post("/v1/predict?tasks=rgb,bgr", files=files).status_code == 200
        assert client.post("/v1/tasks/rgb:predict", content=b"no image").status_code == 400
        rgb, bgr, warm = (account(server, task) for task in ("rgb", "bgr", "warm"))
        assert (rgb.success.count, rgb.inference_count, rgb.execution_count) == (2, 4, 2)
        assert (bgr.success.count, bgr.inference_count, bgr.execution_count) == (1, 1, 1)
        assert rgb.fail.count == rgb.failures[FailureReason.OTHER].count == 1
        assert {size: each.compute_infer.count for size, each in rgb.batches.items()} == {3: 1, 2: 1}
        for part in (rgb.queue, rgb.compute_input, rgb.compute_infer, rgb.compute_output):
            assert part.count == 2
            assert part.ns > 0
        # The parts follow one another, so together they are not more than the whole.
        parts = (rgb.queue, rgb.compute_input, rgb.compute_infer, rgb.compute_output)
        assert sum(part.ns for part in parts) <= rgb.success.ns * 1.01
        assert rgb.last_inference_ms > 0
        assert warm == TaskStatistics(task="warm", version=1)

        samples = triton_samples(client.get("/metrics").text)
        assert set(samples) == {*TRITON_COUNTERS, "nv_inference_pending_request_count"}
        assert samples["nv_inference_count"] == {("bgr", "1"): 1, ("rgb", "1"): 4, ("warm", "1"): 0}
        assert samples["nv_inference_request_failure"][("rgb", "1")] == 1
        assert samples["nv_inference_request_duration_us"][("rgb", "1")] == rgb.success.ns // 1000


def test_tritons_counters_are_declared_as_counters(client):
    lines = client.get("/metrics").text.splitlines()
    assert any(line.startswith('nv_inference_count{model="rgb",version="1"} ') for line in lines)
    assert {line.split()[2] for line in lines if line.startswith("# TYPE nv_") and line.endswith(" counter")} == set(
        TRITON_COUNTERS
    )


def test_requests_that_wait_are_pending_and_their_wait_is_queue_time(toy_bundle):
    settings = ServerSettings(batching=BatchSettings(max_batch_size=1, max_delay_ms=0))
    with (
        serving_gated(toy_bundle, settings) as (server, gate),
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        asked = [pool.submit(client.post, "/v1/tasks/rgb:predict", content=encoded("red")) for _ in range(3)]
        gate.wait_until_running()
        until(lambda: len(server.service.statistics._open) == 3)
        # One runs, one is staged for the device, and one waits in the queue.
        until(lambda: account(server, "rgb").pending == 1)
        assert 'nv_inference_pending_request_count{model="rgb",version="1"} 1' in client.get("/metrics").text
        gate.permit(3)
        assert [each.result(TIMEOUT_S).status_code for each in asked] == [200] * 3
        after = account(server, "rgb")
        assert after.pending == 0
        assert after.queue.ns > after.compute_output.ns


def test_a_failing_batch_is_a_failure_of_the_backend_and_no_execution(toy_bundle):
    with load(toy_bundle) as session:

        class Broken:
            def __getattr__(self, name):
                return getattr(session, name)

            def run(self, images, slots):
                raise RuntimeError("the device fell over")

        with serving(Broken()) as server:
            assert httpx.post(f"{server.url}/v1/tasks/rgb:predict", content=encoded("red")).status_code == 500
            rgb = account(server, "rgb")
            assert rgb.failures[FailureReason.BACKEND].count == 1
            assert (rgb.success.count, rgb.execution_count, rgb.inference_count) == (0, 0, 0)


def test_the_series_of_tasks_that_are_gone_end(tmp_path):
    zoo = write_toy_bundle(tmp_path / "zoo").path
    settings = ServerSettings(watch=zoo, watch_interval_s=0.02)
    with (
        load(zoo) as session,
        serving(session, settings) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        for index in range(3):
            name = f"passing-{index}"
            publish_task(zoo, prompt_set(name, ("red", "green")))
            until(lambda name=name: name in session.tasks)
            assert client.post(f"/v1/tasks/{name}:predict", content=encoded("red")).status_code == 200
            assert f'task="{name}"' in client.get("/metrics").text
            withdraw_task(zoo, name)
            until(lambda name=name: name not in session.tasks)
        assert "passing" not in client.get("/metrics").text


def test_accounts_of_tasks_that_are_gone_do_not_pile_up_where_nobody_reads_them():
    statistics = Statistics(lambda: {("kept", 1)})
    for version in range(1, 2000):
        report = BatchReport(images={"t": 1}, models=frozenset({("t", version)}), queue_s=(0.0,), run_s=1.0)
        statistics.count_batch(report)
    assert len(statistics._accounts) <= 256
    assert [(each.task, each.version) for each in statistics.read()] == [("kept", 1)]


def test_pixels_that_need_no_decoding_take_no_time_for_it(toy_server):
    before = account(toy_server, "warm").compute_input
    body = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3]}]}
    body["inputs"][0]["data"] = solid("red")[np.newaxis].ravel().tolist()
    answer = httpx.post(f"{toy_server.url}/v2/models/warm/infer", json=body)
    assert answer.status_code == 200
    after = account(toy_server, "warm").compute_input
    assert after.count == before.count + 1
    assert toy_server.service.statistics.read()[0].to_json()["inference_stats"]["cache_hit"] == {"count": 0, "ns": 0}
