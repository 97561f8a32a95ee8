"""Starting, following the bundle, and stopping: no accepted request fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import encoded, prompt_set, write_toy_bundle, write_toy_folded

from vpdeploy import load
from vpdeploy.errors import SpecError
from vpdeploy.format.bundle import publish_task, withdraw_task
from vpdeploy.server.run import bind_socket
from vpdeploy.server.settings import ServerSettings
from vpdeploy.serving.batcher import BatchSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def zoo(tmp_path):
    return write_toy_bundle(tmp_path / "zoo").path


@contextlib.contextmanager
def following(zoo) -> Iterator:
    settings = ServerSettings(
        batching=BatchSettings(max_batch_size=8, max_delay_ms=1), watch=zoo, watch_interval_s=0.02
    )
    with load(zoo) as session, serving(session, settings) as server:
        yield server


def test_tasks_published_updated_and_withdrawn_under_load_fail_no_request(zoo, caplog):
    stop, statuses, wrong = threading.Event(), [], []

    def ask(task: str, colour: str) -> None:
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
            while not stop.is_set():
                response = client.post(f"/v1/tasks/{task}:predict?top=1", content=encoded(colour))
                statuses.append(response.status_code)
                label = response.json()["predictions"][0]["label"]
                wrong.extend([label] if label.partition("-")[0] != colour else [])

    caplog.set_level("INFO", logger="vpdeploy")
    with following(zoo) as server, ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(ask, *each) for each in (("rgb", "green"), ("bgr", "blue"), ("warm", "red"))]
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:

            def version_of(task: str) -> int | None:
                return client.get(f"/v1/tasks/{task}").json().get("version")

            try:
                for index in range(4):  # more tasks than slots, and longer prefixes: the table grows
                    publish_task(zoo, prompt_set(f"new-{index}", ("green", "red"), prefix=4 * index + 1))
                    until(lambda index=index: version_of(f"new-{index}") == 1)
                    answer = client.post(f"/v1/tasks/new-{index}:predict", content=encoded("red")).json()
                    assert answer["predictions"][0]["label"] == "red"
                publish_task(zoo, prompt_set("rgb", ("red-2", "green-2", "blue-2")))
                until(lambda: version_of("rgb") == 2)
                withdraw_task(zoo, "new-0")
                until(lambda: client.get("/v1/tasks/new-0").status_code == 404)
            finally:
                stop.set()
            assert client.post("/v1/tasks/rgb:predict", content=encoded("green")).json()["version"] == 2
        for each in loads:
            each.result(TIMEOUT_S)
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert wrong == []
    for line in ("tasks added: new-0", "tasks updated: rgb", "tasks removed: new-0"):
        assert line in caplog.text


def test_a_damaged_task_is_told_by_name_while_the_others_are_served_and_followed(zoo, caplog):
    damaged = zoo / "tasks/warm/1/prompts.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    settings = ServerSettings(watch=zoo, watch_interval_s=0.02)
    with (
        load(zoo, strict=False) as session,
        serving(session, settings) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        (failed,) = client.get("/v1/tasks").json()["failed"]
        assert failed["task"] == "warm"
        assert "warm/1/prompts.safetensors: contents do not match" in failed["reason"]
        assert {"name": "warm", "version": "", "state": "UNAVAILABLE", "reason": failed["reason"]} in client.post(
            "/v2/repository/index"
        ).json()
        assert server.metric("vpdeploy_failed_tasks") == 1
        assert client.post("/v1/tasks/rgb:predict", content=encoded("red")).status_code == 200
        refused = client.post("/v1/tasks/warm:predict", content=encoded("red"))
        assert (refused.status_code, refused.json()["error"].split(";")[0]) == (
            404,
            "task 'warm' is damaged and not loaded",
        )
        withdraw_task(zoo, "bgr")
        until(lambda: client.get("/v1/tasks/bgr").status_code == 404)
        assert caplog.text.count("task 'warm' cannot be loaded") == 1
        damaged.write_bytes(whole)
        until(lambda: client.get("/v1/tasks/warm").status_code == 200)
        assert (client.get("/v1/tasks").json()["failed"], server.metric("vpdeploy_failed_tasks")) == ([], 0)


def replace(file: Path, content: bytes) -> None:
    """Swaps the content in one step: a watcher looking on sees the old bytes or the new, never a part."""
    fresh = file.with_name(".fresh")
    fresh.write_bytes(content)
    fresh.replace(file)


def test_a_damaged_bundle_is_complained_about_once_and_what_is_loaded_stays(zoo, caplog):
    manifest = zoo / "manifest.json"
    good = manifest.read_bytes()
    with following(zoo) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:

        def works() -> bool:
            return client.post("/v1/tasks/rgb:predict", content=encoded("red")).status_code == 200

        assert works()
        replace(manifest, b"{ not a manifest")
        until(lambda: "cannot be followed" in caplog.text)
        for _ in range(20):
            assert works()
        manifest.unlink()
        until(lambda: "No such file" in caplog.text)
        assert works()
        replace(manifest, good)
        publish_task(zoo, prompt_set("new", ("red", "green")))
        until(lambda: client.get("/v1/tasks/new").status_code == 200)
        assert works()
    assert [record.levelname for record in caplog.records].count("ERROR") == 2


def test_a_task_with_damaged_files_is_not_loaded_and_the_others_stay(zoo, caplog):
    with following(zoo) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        spare = zoo.parent / "spare"
        shutil.copytree(zoo, spare)
        publish_task(spare, prompt_set("broken", ("red", "green")))
        shutil.copytree(spare / "tasks" / "broken", zoo / "tasks" / "broken")
        (zoo / "tasks" / "broken" / "1" / "prompts.safetensors").write_bytes(b"damaged")
        (spare / "manifest.json").replace(zoo / "manifest.json")
        until(lambda: "sha256" in caplog.text)
        assert client.get("/v1/tasks/broken").status_code == 404
        assert client.post("/v1/tasks/rgb:predict", content=encoded("red")).status_code == 200


def test_stopping_answers_the_requests_under_way(toy_bundle):
    settings = ServerSettings(batching=BatchSettings(max_batch_size=2, max_delay_ms=0))
    with ThreadPoolExecutor(8) as pool, serving_gated(toy_bundle, settings) as (server, gate):

        def ask() -> int:
            return httpx.post(f"{server.url}/v1/tasks/rgb:predict", content=encoded("red")).status_code

        first = pool.submit(ask)
        gate.wait_until_running()
        queued = [pool.submit(ask) for _ in range(5)]
        until(lambda: server.metric("vpdeploy_queue_images") == 3)  # two are staged
        server.stop()
        assert not server.service.is_ready
        gate.permit(10)
        assert [each.result(TIMEOUT_S) for each in [first, *queued]] == [200] * 6
        server.join()
        with pytest.raises(httpx.ConnectError):
            ask()


def test_readiness_ends_before_the_server_does(toy_bundle):
    with (
        load(toy_bundle) as session,
        serving(session) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        assert client.get("/v2/health/ready").status_code == 200
        server.service.draining = True
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/models/rgb/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200


def test_requests_after_the_end_are_told_to_go_elsewhere(toy_bundle):
    with load(toy_bundle) as session, serving(session) as server:
        server.service.batcher.close()
        refused = httpx.post(f"{server.url}/v1/tasks/rgb:predict", content=encoded("red"))
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_ours_is_one_clear_error(host):
    with pytest.raises(SpecError, match=f"cannot listen on {host}:8000"):
        bind_socket(host, 8000)


def test_a_folded_model_is_served_under_its_tasks_name(tmp_path):
    path = write_toy_folded(tmp_path / "task.onnx", "bgr")
    with load(path) as session, serving(session) as server:
        answer = httpx.post(f"{server.url}/v1/tasks/bgr:predict", content=encoded("red")).json()
        assert (answer["version"], answer["predictions"][0]["label"]) == (1, "red")
        assert httpx.get(f"{server.url}/v2/models/bgr/versions/1/ready").status_code == 200


@contextlib.contextmanager
def command(*arguments: object, **environment: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", "from vpdeploy.cli.main import main; main()", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_announces_itself_and_ends_with_success(zoo, number):
    with command(
        zoo, "--port", 0, "--log-format", "json", "--max-delay-ms", 1, "--lame-duck-s", 0.1, VPDEPLOY_TOKEN="secret"
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("serving 3 tasks on http://127.0.0.1:")
        assert line.rstrip().endswith("(runtime onnxruntime-cpu)")
        url = line.split()[4]
        publish_task(zoo, prompt_set("new", ("red", "green")))
        header = {"authorization": "Bearer secret"}
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            assert client.get("/v1/tasks").status_code == 401
            until(lambda: client.get("/v1/tasks/new", headers=header).status_code == 200)
            process.send_signal(number)
            out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert out == ""
    messages = [json.loads(each)["message"] for each in err.splitlines()]
    assert messages[0].startswith("runtime onnxruntime-cpu: ")
    assert messages[1].startswith("batches of at most ")
    assert "measured now (images/s by size: 1: " in messages[1]
    assert "tasks added: new" in messages
    assert messages[-1].startswith("stopped")
    assert "secret" not in err


def test_the_command_names_a_port_that_is_in_use(zoo):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with command(zoo, "--port", port) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert len(err.splitlines()) == 1


def test_the_command_warns_of_an_open_server(tmp_path):
    with command(tmp_path / "nothing", "--host", "0.0.0.0", "--port", 0) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert out == ""
    warning, error = err.splitlines()
    assert warning.startswith("WARNING: listening on 0.0.0.0 without a token")
    assert "does not exist" in error


def test_the_command_refuses_an_empty_token(zoo):
    with command(zoo, "--port", 0, VPDEPLOY_TOKEN="") as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: VPDEPLOY_TOKEN is empty")


def test_the_command_takes_sizes_with_units(zoo):
    with command(
        zoo, "--port", 0, "--max-body-bytes", "1KiB", "--max-buffered-bytes", "1MB", "--lame-duck-s", 0
    ) as process:
        url = process.stdout.readline().split()[4]
        refused = httpx.post(f"{url}/v1/tasks/rgb:predict", content=bytes(1025))
        assert refused.status_code == 413
        assert "1024 bytes" in refused.json()["error"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
