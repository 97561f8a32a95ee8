"""What hangs, dies or fails for good: readiness ends, what waits is refused, and nothing hangs with it."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from server.running import TIMEOUT_S, serving, serving_gated, until
from server.toy_bundle import encoded

from vpdeploy import load
from vpdeploy.errors import BackendError
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.watchdog import Watchdog
from vpdeploy.serving.batcher import BatchSettings
from vpdeploy.serving.pulse import Pulse

PREDICT = "/v1/tasks/rgb:predict"


class Watched:
    """A watchdog whose clock and patient the test moves."""

    def __init__(self, *, stall_s: float = 8.0) -> None:
        self.now = 100.0
        self.pulse = Pulse()
        self.probes = 0
        self.faults: list[str] = []
        self.dog = Watchdog(
            [lambda: self.pulse, Pulse],
            stall_s=stall_s,
            probe=self.probe,
            on_fault=self.faults.append,
            clock=lambda: self.now,
        )

    def probe(self) -> None:
        self.probes += 1

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.dog.look()


def test_work_that_stands_still_is_doubted_at_half_time_and_a_fault_at_full_time():
    watched = Watched(stall_s=8)
    watched.pulse = Pulse(is_busy=True, mark=1, place="in the runtime")
    watched.pass_time(4.0)  # the first look sees the mark change
    assert watched.dog.doubt is None
    watched.pass_time(0.25)
    assert watched.dog.doubt == "work has stood still for 4 s in the runtime"
    assert watched.faults == []
    watched.pass_time(4.0)
    assert watched.faults == ["work has stood still for 8 s in the runtime"]
    watched.pulse = Pulse()
    watched.pass_time(20.0)
    assert watched.dog.fault == watched.faults[0]
    assert len(watched.faults) == 1


def test_slow_work_that_moves_is_no_fault():
    watched = Watched(stall_s=8)
    for mark in range(10):
        watched.pulse = Pulse(is_busy=True, mark=mark)
        watched.pass_time(3.5)
        assert watched.dog.doubt is None


def test_rest_is_no_fault():
    watched = Watched(stall_s=8)
    watched.pulse = Pulse(is_busy=False, mark=3)
    watched.pass_time(100)
    assert watched.dog.doubt is None


def test_a_process_that_was_stopped_and_continued_has_not_stalled():
    watched = Watched(stall_s=8)
    watched.pulse = Pulse(is_busy=True, mark=1)
    watched.pass_time(1.0)
    watched.now += 3600
    watched.dog.look()
    assert watched.dog.doubt is None


def test_batches_that_fail_in_a_row_are_probed_and_a_fault_in_the_end():
    watched = Watched(stall_s=20)
    watched.pulse = Pulse(failures=2)
    watched.pass_time(1.0)
    assert watched.dog.doubt is None
    assert watched.probes == 1
    watched.pulse = Pulse(failures=3)
    watched.pass_time(10.0)
    assert watched.dog.doubt == "the last 3 batches failed"
    assert watched.probes == 3
    watched.pulse = Pulse(failures=0)  # a probe that succeeds
    watched.pass_time(0.25)
    assert watched.dog.doubt is None
    watched.pulse = Pulse(failures=7)
    watched.pass_time(20.0)
    assert watched.faults == ["the last 7 batches failed, for 20 s"]


def quick(**fields) -> ServerSettings:
    return ServerSettings(batching=BatchSettings(max_batch_size=1, max_delay_ms=0), **fields)


def ask(url: str) -> httpx.Response:
    return httpx.post(f"{url}{PREDICT}", content=encoded("red"), timeout=TIMEOUT_S)


def test_a_runtime_that_never_returns_is_unready_then_refused_and_the_server_ends(toy_bundle, caplog):
    with (
        ThreadPoolExecutor(4) as pool,
        serving_gated(toy_bundle, quick(stall_s=1.5)) as (server, gate),
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        waiting = [pool.submit(ask, server.url) for _ in range(4)]
        gate.wait_until_running()
        assert client.get("/v2/health/ready").status_code == 200
        until(lambda: client.get("/v2/health/ready").status_code == 503)
        assert client.get("/v2/models/rgb/ready").status_code == 503
        doubt = client.get("/v2/health/ready").json()["error"]
        assert doubt.startswith("work has stood still for 1 s in the runtime, at a batch of 1 images")
        assert [each.result(TIMEOUT_S).status_code for each in waiting] == [503] * 4
        server.join()
        assert not server.service.is_closed
    faults = [record for record in caplog.records if record.levelno >= logging.CRITICAL]
    assert [record.getMessage().partition(";")[0] for record in faults] == [
        "work has stood still for 2 s in the runtime, at a batch of 1 images"
    ]


@pytest.mark.parametrize("victim", ["runner", "dispatcher"])
def test_a_batch_thread_that_dies_leaves_nobody_waiting(toy_bundle, caplog, victim):
    class Death(BaseException):
        pass

    def die(*_) -> None:
        raise Death("gone")

    with serving_gated(toy_bundle, quick()) as (server, gate):
        gate.permit(10)
        if victim == "runner":
            gate.run = die
        else:
            server.service.batcher._report = die
        refused = ask(server.url)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        server.join()
        assert server.service.watchdog.fault == f"the {victim} of batches ended: Death: gone"
        assert server.service.is_closed
    assert f"the {victim} of batches ended" in caplog.text


def test_decoders_that_never_return_are_a_fault(toy_bundle):
    never = threading.Event()
    with (
        ThreadPoolExecutor(2) as pool,
        load(toy_bundle) as session,
        serving(session, quick(stall_s=1.0, decode_threads=1)) as server,
    ):
        server.service._decoder._decode = lambda *_: never.wait(TIMEOUT_S)
        waiting = [pool.submit(ask, server.url) for _ in range(2)]
        assert [each.result(TIMEOUT_S).status_code for each in waiting] == [503] * 2
        server.join()
        assert "in all 1 threads that read requests and decode images" in server.service.watchdog.fault
        assert not server.service.is_closed
        never.set()


def test_readiness_follows_the_failures_of_the_runtime(toy_bundle):
    with (
        serving_gated(toy_bundle, quick()) as (server, gate),
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        gate.permit(100)
        run = gate.run

        def fail(images: np.ndarray, slots: np.ndarray) -> np.ndarray:
            raise BackendError("the device is lost")

        gate.run = fail
        assert [client.post(PREDICT, content=encoded("red")).status_code for _ in range(3)] == [500] * 3
        until(lambda: client.get("/v2/health/ready").status_code == 503)
        assert "batches failed" in client.get("/v2/health/ready").json()["error"]
        assert client.get("/v2/health/live").status_code == 200
        assert server.metric("vpdeploy_failed_batches_total") >= 3
        gate.run = run
        assert client.post(PREDICT, content=encoded("red")).status_code == 200
        until(lambda: client.get("/v2/health/ready").status_code == 200)


def test_an_event_loop_that_hangs_is_a_fault(toy_bundle):
    hanging = threading.Event()
    with load(toy_bundle) as session, serving(session, quick(stall_s=1.0)) as server:
        until(lambda: server.service._beats > 0)
        server.loop.call_soon_threadsafe(hanging.wait, TIMEOUT_S)
        until(lambda: server.service.watchdog.fault is not None)
        assert "on the event loop" in server.service.watchdog.fault
        hanging.set()
        server.join()
