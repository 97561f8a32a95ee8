"""Stopping: readiness first, then the listener, then what was accepted; and an end in time, whatever hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.server.settings import ServerSettings
from vpdeploy.serving.batcher import BatchSettings

ROOT = Path(__file__).resolve().parents[2]
PREDICT = "/v1/tasks/rgb:predict"


def ask(url: str) -> httpx.Response:
    return httpx.post(f"{url}{PREDICT}", content=encoded("red"), timeout=TIMEOUT_S)


def listens(address: str) -> bool:
    try:
        socket.create_connection(address.split(":"), timeout=TIMEOUT_S).close()
    except ConnectionRefusedError:
        return False
    return True


def test_readiness_ends_while_the_listener_still_answers(toy_bundle):
    settings = ServerSettings(lame_duck_s=60)
    with load(toy_bundle) as session, serving(session, settings) as server:
        server.server.stop_step()
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 503
        answer = ask(server.url)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"  # the next request may go elsewhere
        server.server.stop_step()
        server.join()
        assert not listens(server.address)
        assert server.server.unanswered == 0


def test_a_third_signal_ends_the_wait_for_requests(toy_bundle):
    settings = ServerSettings(batching=BatchSettings(max_batch_size=1, max_delay_ms=0), lame_duck_s=60, drain_s=60)
    with ThreadPoolExecutor(1) as pool, serving_gated(toy_bundle, settings) as (server, gate):
        waiting = pool.submit(ask, server.url)
        gate.wait_until_running()
        server.server.stop_step()
        server.server.stop_step()
        until(lambda: not listens(server.address))
        server.server.stop_step()
        with pytest.raises(httpx.RemoteProtocolError):
            waiting.result(TIMEOUT_S)
        gate.permit()
        server.join()
        assert server.server.unanswered == 1
        assert server.service.is_closed


def stalled_upload(address: str) -> socket.socket:
    connection = socket.create_connection(address.split(":"), timeout=TIMEOUT_S)
    connection.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode() + bytes(500))
    return connection


def test_stalled_uploads_are_counted_and_leave_no_traceback(toy_bundle, caplog):
    caplog.set_level(logging.INFO)
    settings = ServerSettings(drain_s=0.2)
    with load(toy_bundle) as session, serving(session, settings) as server:
        with stalled_upload(server.address), stalled_upload(server.address):
            until(lambda: server.metric("vpdeploy_body_bytes") == 1000)
            server.stop()
            server.join()
        assert server.server.unanswered == 2
        assert server.service.is_closed
        assert server.metric("vpdeploy_requests_total", task="rgb", status="499") == 2
    assert not [record for record in caplog.records if record.exc_info]


def test_a_handler_that_listens_to_nobody_is_cancelled_without_a_traceback(toy_bundle, caplog):
    begun = threading.Event()
    with load(toy_bundle) as session, serving(session, ServerSettings(drain_s=0.1)) as server:

        async def deaf(request: object) -> None:
            begun.set()
            await asyncio.sleep(TIMEOUT_S)

        server.server._app.add_route("/deaf", deaf)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(httpx.get, f"{server.url}/deaf", timeout=TIMEOUT_S)
            assert begun.wait(TIMEOUT_S)
            server.stop()
            server.join()
            with pytest.raises(httpx.TransportError):
                asking.result(TIMEOUT_S)
        assert server.server.unanswered == 1
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_never_reads_its_answer_is_counted(toy_bundle):
    settings = ServerSettings(drain_s=0.2)
    with load(toy_bundle) as session, serving(session, settings) as server:
        with socket.socket() as greedy:
            greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = server.address.split(":")
            greedy.connect((host, int(port)))
            greedy.settimeout(0.2)
            with contextlib.suppress(TimeoutError):  # until the answers fill every buffer
                while True:
                    greedy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            server.stop()
            server.join()
        assert server.server.unanswered >= 1
        assert server.service.is_closed


SCRIPT = """
import sys
import threading
import vpdeploy
from server.running import *
from server.toy_bundle import *
from vpdeploy.server.app import create_app
from vpdeploy.server.logs import configure_logs
from vpdeploy.server.run import address_of, bind_socket, run_server
from vpdeploy.server.settings import ServerSettings

hang = threading.Event()
configure_logs("text")
settings = ServerSettings(**{settings})
with bind_socket("127.0.0.1", 0) as listener, vpdeploy.load({zoo!r}) as session:
    session.run = lambda *_: (print("running", flush=True), hang.wait())
    address = address_of(listener)
    ended = run_server(create_app(session, settings), listener, on_listening=lambda: print(address, flush=True))
sys.exit(0 if ended else 1)
"""


@contextlib.contextmanager
def process(zoo: Path, **settings: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own whose runtime never returns."""
    code = textwrap.dedent(SCRIPT).format(settings=settings, zoo=str(zoo))
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    try:
        yield running, f"http://{running.stdout.readline().strip()}"
    finally:
        running.kill()
        running.communicate()


def test_a_runtime_that_hangs_ends_the_process_with_one_line_and_an_error_code(toy_bundle):
    with process(toy_bundle, stall_s=1.0) as (running, url):
        assert ask(url).status_code == 503
        _, err = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    [line] = [each for each in err.splitlines() if "everything that waits is refused and the server ends" in each]
    assert "stood still for 1 s in the runtime" in line


def test_a_signal_ends_a_process_whose_runtime_hangs(toy_bundle):
    with (
        ThreadPoolExecutor(1) as pool,
        process(toy_bundle, lame_duck_s=0.0, drain_s=0.2) as (running, url),
    ):
        asking = pool.submit(ask, url)
        assert running.stdout.readline() == "running\n"
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=TIMEOUT_S)
        with pytest.raises(httpx.TransportError):
            asking.result(TIMEOUT_S)
    assert running.returncode == 1
    assert re.search(r"ended without waiting for what hangs; .* took too long: 1$", err.strip())
    assert "Traceback" not in err
