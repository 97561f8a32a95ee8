"""The bundle's watcher: it outlives whatever goes wrong, and says so once."""

from __future__ import annotations

import logging
import threading

import httpx
import pytest
from server.running import TIMEOUT_S, serving, until
from server.toy_bundle import encoded, prompt_set, write_toy_bundle

from vpdeploy import load
from vpdeploy.format.bundle import publish_task, withdraw_task
from vpdeploy.server.metrics import Metrics
from vpdeploy.server.settings import ServerSettings
from vpdeploy.server.watch import BundleWatcher
from vpdeploy.session.session import SyncReport


@pytest.fixture
def zoo(tmp_path):
    return write_toy_bundle(tmp_path / "zoo").path


def test_an_unexpected_error_is_logged_once_counted_each_time_and_followed_by_success(zoo, caplog):
    caplog.set_level(logging.INFO)
    failures, errors = [], [ZeroDivisionError("odd"), ZeroDivisionError("odd"), KeyError("other"), None]

    def sync() -> SyncReport:
        error = errors.pop(0)
        if error is not None:
            raise error
        return SyncReport(added=("new",))

    watcher = BundleWatcher(sync, zoo, interval_s=0.001, on_failure=lambda: failures.append(1))
    watcher.start()
    until(lambda: not errors)
    assert watcher.close(timeout_s=TIMEOUT_S)
    assert len(failures) == 3
    lines = [record.getMessage().partition("unexpectedly, ")[2] for record in caplog.records if record.exc_info]
    assert lines == ["ZeroDivisionError: odd", "KeyError: 'other'"]
    assert "tasks added: new" in caplog.text


def test_closing_does_not_wait_for_ever_for_a_bundle_that_hangs(zoo):
    began, never = threading.Event(), threading.Event()

    def sync() -> SyncReport:
        began.set()
        never.wait(TIMEOUT_S)
        return SyncReport()

    watcher = BundleWatcher(sync, zoo, interval_s=1)
    watcher.start()
    assert began.wait(TIMEOUT_S)
    assert not watcher.close(timeout_s=0.01)
    never.set()
    assert watcher.close(timeout_s=TIMEOUT_S)


def test_a_server_whose_watcher_met_an_unexpected_error_closes_as_always(zoo):
    settings = ServerSettings(watch=zoo, watch_interval_s=0.01)
    with load(zoo) as session:
        sync, errors = session.sync, [RecursionError()] * 2
        session.sync = lambda: sync() if not errors else errors.pop()()
        with serving(session, settings) as server:
            until(lambda: server.metric("vpdeploy_failed_syncs_total") >= 2)
            publish_task(zoo, prompt_set("new", ("red", "green")))
            until(lambda: "new" in session.tasks)
        assert server.service.is_closed


def series(metrics: Metrics, name: str) -> dict[str, float]:
    """What a counter shows of each task."""
    lines = metrics.render()[0].decode().splitlines()
    shown = [line for line in lines if line.startswith(f"{name}{{")]
    return {line.partition('task="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in shown}


def test_series_of_removed_tasks_go_and_their_counts_stay():
    loaded = ["a", "b"]
    metrics = Metrics(lambda: loaded, lambda: [])
    for task, count in (("a", 3), ("b", 2), ("(unknown)", 1)):
        for _ in range(count):
            metrics.count_request(task=task, status=200, seconds=0.1)
    assert series(metrics, "vpdeploy_requests_total") == {"a": 3, "b": 2, "(unknown)": 1}
    loaded.remove("a")
    assert series(metrics, "vpdeploy_requests_total") == {"b": 2, "(unknown)": 1, "(removed)": 3}
    metrics.count_request(task="a", status=200, seconds=0.1)  # it was under way
    assert series(metrics, "vpdeploy_requests_total") == {"b": 2, "(unknown)": 1, "(removed)": 4}
    assert series(metrics, "vpdeploy_request_seconds_count") == {"b": 2, "(unknown)": 1, "(removed)": 4}


def test_counting_and_removing_at_once_loses_nothing():
    metrics, stop = Metrics(lambda: [], lambda: []), threading.Event()

    def remove() -> None:
        while not stop.is_set():
            metrics.render()

    def count() -> None:
        for index in range(500):
            metrics.count_request(task=f"t{index % 7}", status=200, seconds=0.1)

    remover, counters = threading.Thread(target=remove), [threading.Thread(target=count) for _ in range(4)]
    for thread in (remover, *counters):
        thread.start()
    for thread in counters:
        thread.join(TIMEOUT_S)
    stop.set()
    remover.join(TIMEOUT_S)
    assert series(metrics, "vpdeploy_requests_total") == {"(removed)": 2000}


def test_a_removed_tasks_series_leave_the_served_metrics(zoo):
    settings = ServerSettings(watch=zoo, watch_interval_s=0.01)
    with load(zoo) as session, serving(session, settings) as server:
        httpx.post(f"{server.url}/v1/tasks/warm:predict", content=encoded("red"))
        assert 'task="warm"' in httpx.get(f"{server.url}/metrics").text
        withdraw_task(zoo, "warm")
        until(lambda: "warm" not in session.tasks)
        text = httpx.get(f"{server.url}/metrics").text
        assert 'task="warm"' not in text
        assert 'vpdeploy_images_total{task="(removed)"} 1.0' in text
