"""The order in which images leave the queue."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from vpdeploy.serving.queue import Answer, FairQueue, SharedLease


def image(task: str, priority: int) -> Answer:
    lease = SimpleNamespace(slot=0, card=SimpleNamespace(name=task), version=1, release=lambda: None)
    pixels = np.zeros((1, 1, 3), np.uint8)
    shared = SharedLease(lease, 1)
    return Answer(pixels, shared, queued_at=0.0, expires_at=None, withdraw=lambda answer: None, priority=priority)


def test_priority_overtakes_within_a_task_and_takes_no_turn_of_another():
    queue = FairQueue()
    low, usual, high, late_high = (image("flowers", priority) for priority in (3, 2, 1, 1))
    other, other_low = image("birds", 2), image("birds", 3)
    for each in (low, usual, other_low, other, high, late_high):
        queue.append(each)
    assert [queue.pop() for _ in range(len(queue))] == [high, other, late_high, other_low, usual, low]


def test_what_is_withdrawn_leaves_no_level_and_no_task_behind():
    queue = FairQueue()
    first, second = image("flowers", 1), image("flowers", 3)
    queue.append(first)
    queue.append(second)
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.pop() is second
    assert len(queue) == 0
    assert not queue.remove(second)
