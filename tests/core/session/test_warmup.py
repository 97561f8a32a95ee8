"""A warm-up runs every size up to the largest before the first request."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np

from vpdeploy.session.warmup import warm_up


class Recording:
    """A session that remembers the sizes it ran; each run takes a second of its clock."""

    def __init__(self, tasks=("a",)):
        self.tasks = tasks
        self.preprocessing = SimpleNamespace(image_size=4)
        self.sizes, self.now, self.leases = [], 0.0, 0

    @contextlib.contextmanager
    def lease(self, task):
        self.leases += 1
        yield SimpleNamespace(slot=2)
        self.leases -= 1

    def run(self, images, slots):
        assert self.leases == 1
        assert images.shape == (len(slots), 4, 4, 3)
        assert set(slots.tolist()) == {2}
        self.sizes.append(len(images))
        self.now += 1
        return np.zeros((len(images), 1), np.float32)


def test_every_doubling_up_to_the_largest_size_is_run():
    session = Recording()
    warmed = warm_up(session, max_batch_size=12, clock=lambda: session.now)
    assert session.sizes == [1, 1, 2, 4, 8, 12]
    assert str(warmed) == "batches of 1, 2, 4, 8, 12; the first image took 1000.0 ms, the next 1000.0 ms"


def test_a_slow_model_is_not_run_for_longer_than_the_budget():
    session = Recording()
    warmed = warm_up(session, max_batch_size=64, budget_s=3, clock=lambda: session.now)
    assert warmed.sizes == (1, 2)


def test_single_images_and_empty_sessions_need_little():
    session = Recording()
    warm_up(session, max_batch_size=1, clock=lambda: session.now)
    assert session.sizes == [1, 1]
    assert warm_up(Recording(tasks=()), max_batch_size=8) is None
