"""What systemd is told, read from a real socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
from server.running import TIMEOUT_S
from server.toy_bundle import write_toy_bundle

from vpdeploy.server.systemd import Notifier


@pytest.fixture(params=["file", "abstract"])
def manager(request, tmp_path):
    name = str(tmp_path / "notify") if request.param == "file" else f"@vpdeploy-test-{os.getpid()}"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        listener.settimeout(TIMEOUT_S)
        yield name, listener


def nothing_more(listener) -> bool:
    listener.setblocking(False)
    try:
        listener.recv(4096)
    except BlockingIOError:
        return True
    return False


def test_systemd_hears_that_the_server_is_ready_alive_and_stopping(manager):
    name, listener = manager
    now = [0.0]
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(environment, clock=lambda: now[0])
    notifier.ready("serving 3\ntasks")
    assert listener.recv(4096) == b"READY=1\nSTATUS=serving 3 tasks"
    for now[0] in (0.0, 1.0, 4.9, 5.0, 6.0, 10.0):
        notifier.beat()
    assert [listener.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    notifier.stopping()
    notifier.stopping()
    assert listener.recv(4096) == b"STOPPING=1"
    assert nothing_more(listener)


@pytest.mark.parametrize("variables", [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
def test_without_a_watchdog_of_its_own_a_server_gives_no_signs_of_life(manager, variables):
    name, listener = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, **variables})
    notifier.beat()
    assert nothing_more(listener)


@pytest.mark.parametrize("name", ["", "relative/path", "/does/not/exist/at/all"])
def test_where_nobody_listens_serving_goes_on(name):
    Notifier({"NOTIFY_SOCKET": name}).ready("serving")


def test_a_served_bundle_tells_systemd_when_it_is_ready_and_when_it_stops(tmp_path):
    zoo = write_toy_bundle(tmp_path / "zoo").path
    name = str(tmp_path / "notify")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(name)
        manager.settimeout(TIMEOUT_S)
        options = ["--port", "0", "--max-batch-size", "4", "--no-warmup"]
        process = subprocess.Popen(
            [sys.executable, "-m", "vpdeploy", "serve", str(zoo), *options],
            env={**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            told = [manager.recv(4096)]
            while told.count(b"WATCHDOG=1") < 2:
                told.append(manager.recv(4096))
            process.send_signal(signal.SIGTERM)
            while told[-1] != b"STOPPING=1":
                told.append(manager.recv(4096))
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
    assert told[0] == b"READY=1\nSTATUS=serving 3 tasks"
