"""What the live charts are drawn from."""

from __future__ import annotations

import pytest
from server.toy_bundle import encoded

from vpdeploy.server.activity import KEPT_SECONDS, Activity
from vpdeploy.serving.batch import BatchReport


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def report(**images: int) -> BatchReport:
    return BatchReport(images=images, queue_s=(0.25,) * sum(images.values()), run_s=0.5)


def test_batches_add_up_by_the_second_in_which_they_end(clock):
    activity = Activity(clock=clock)
    activity.count_batch(report(birds=2))
    activity.count_batch(report(birds=1, flowers=3))
    assert activity.seconds(since=0) == []  # the second is not over
    clock.now += 2
    activity.count_batch(report(flowers=1))
    clock.now += 1
    first = {"second": 0, "batches": 2, "tasks": 3, "run_s": 1.0, "waited_s": 1.5, "images": {"birds": 3, "flowers": 3}}
    third = {"second": 2, "batches": 1, "tasks": 1, "run_s": 0.5, "waited_s": 0.25, "images": {"flowers": 1}}
    assert activity.seconds(since=0) == [first, third]
    assert activity.seconds(since=1) == [third]
    assert activity.second == 3


def test_only_the_last_seconds_are_remembered(clock):
    activity = Activity(clock=clock)
    for _ in range(3 * KEPT_SECONDS):
        activity.count_batch(report(birds=1))
        clock.now += 1
    assert [each["second"] for each in activity.seconds(since=0)] == list(range(2 * KEPT_SECONDS, 3 * KEPT_SECONDS))
    clock.now += KEPT_SECONDS
    assert activity.seconds(since=0) == []


def test_the_server_tells_what_its_batches_held(client):
    began = client.get("/v1/activity").json()
    assert client.post("/v1/predict?tasks=rgb,warm", content=encoded("red")).status_code == 200
    while (found := client.get(f"/v1/activity?since={began['second']}").json())["second"] == began["second"]:
        pass
    images = [each["images"] for each in found["seconds"]]
    assert {"rgb", "warm"} <= set().union(*images)
    assert found["ready"] is True
    assert found["queue_images"] == 0
    assert found["server"] == began["server"]
    assert found["limits"] == {
        "max_batch_size": 32,
        "max_queue_size": 1024,
        "max_body_bytes": 64 << 20,
        "max_images": 128,
    }


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "9" * 13, ""])
def test_a_second_that_is_no_number_is_refused(client, since):
    response = client.get("/v1/activity", params={"since": since})
    assert response.status_code == 400
    assert "since" in response.json()["error"]
