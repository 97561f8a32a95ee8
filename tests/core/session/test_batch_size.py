from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import vpdeploy
from vpdeploy.errors import BackendError
from vpdeploy.session import batch_size, batch_size_cache
from vpdeploy.session.batch_size import BatchSize, choose_batch_size, measure_sizes
from vpdeploy.session.session import Session


class Device:
    """A device that takes as long as a formula says, by a clock that only it moves."""

    def __init__(self, seconds: Callable[[int], float], *, first_s: float = 0.0, most: int = 10**6) -> None:
        self.now = 0.0
        self.sizes: list[int] = []
        self.seconds = seconds
        self._first_s = first_s
        self._most = most

    def run(self, size: int) -> None:
        self.now += self.seconds(size) + (0.0 if self.sizes else self._first_s)
        self.sizes.append(size)
        if size > self._most:
            raise BackendError("out of memory")

    def measure(self, *, limit: int = 128, budget_s: float = 4.0) -> tuple[dict[int, float], bool]:
        return measure_sizes(self.run, limit=limit, budget_s=budget_s, clock=lambda: self.now)

    def choose(self, **options: float) -> int:
        rates, tried_all = self.measure(**options)  # type: ignore[arg-type]
        return BatchSize.of(rates, tried_all=tried_all).size


def test_the_smallest_size_within_three_percent_of_the_best_is_chosen():
    # 1 ms a batch and 0.1 ms an image: 0.108 ms an image at 128, 0.116 at 64.
    assert Device(lambda size: 0.001 + 0.0001 * size).choose() == 128
    # 1 ms and 2 ms: 2.0156 ms an image at 64, which is the best tried; 3 % more are 2.078, and 16 takes 2.0625.
    assert Device(lambda size: 0.001 + 0.002 * size).choose() == 16


def test_where_larger_batches_are_slower_small_ones_are_chosen():
    assert Device(lambda size: 0.002 * size * (1 + size / 100)).choose() == 1


def test_the_limit_is_never_exceeded_and_is_tried_itself():
    device = Device(lambda size: 0.001 + 0.0001 * size)
    assert device.choose(limit=24) == 24
    assert max(device.sizes) == 24


def test_a_huge_model_is_measured_no_longer_than_the_budget_and_one_run():
    device = Device(lambda size: 1.5 * size)
    rates, tried_all = device.measure()
    assert device.now <= 1.5 + 4.0 + 1.5
    assert (list(rates), tried_all) == ([1], False)
    assert "take too long" in BatchSize.of(rates, tried_all=tried_all).reason


def test_kernels_that_the_first_run_compiles_do_not_use_up_the_time():
    device = Device(lambda size: 0.001 + 0.002 * size, first_s=60.0)
    assert device.choose() == 16


def test_a_size_for_which_memory_is_short_ends_the_search():
    assert Device(lambda size: 0.001 + 0.0001 * size, most=16).choose() == 16
    with pytest.raises(BackendError, match="out of memory"):
        Device(lambda size: 0.001, most=0).measure()


def test_a_machine_that_slows_down_meanwhile_changes_nothing():
    device = Device(lambda size: 0.0)
    device.seconds = lambda size: (0.001 + 0.002 * size) * (1 + device.now / 20)
    assert device.choose() == 16


def test_a_hiccup_at_the_first_look_does_not_rule_a_size_out():
    device = Device(lambda size: 0.0)
    device.seconds = lambda size: 0.001 + 0.002 * size + 0.2 * (size == 16 and 16 not in device.sizes)
    assert device.choose() == 16


def choose_quickly(session: Session) -> BatchSize:
    """Measure by a clock that goes on by 10 ms at every look: a turn of a size is one run, on any machine."""
    ticks = itertools.count()
    return choose_batch_size(session, budget_s=1.0, clock=lambda: next(ticks) / 100)


@pytest.fixture
def session(zoo_copy: Path) -> Iterator[Session]:
    with vpdeploy.load(zoo_copy, threads=2) as session:
        yield session


def test_a_second_start_takes_what_the_first_has_noted(session: Session, monkeypatch: pytest.MonkeyPatch):
    first = choose_quickly(session)
    monkeypatch.setattr(batch_size, "measure_sizes", None)
    second = choose_batch_size(session)
    assert (second.size, second.images_per_s) == (first.size, first.images_per_s)
    assert "measured now" in first.reason
    assert "measured earlier" in second.reason


def test_another_number_of_threads_is_measured_by_itself(session: Session):
    choose_quickly(session)
    noted = batch_size_cache.BatchSizeCache.of(session)
    with vpdeploy.load(session.artifact.path, threads=1) as other:
        assert batch_size_cache.BatchSizeCache.of(other).path != noted.path
        assert batch_size_cache.BatchSizeCache.of(other).read() is None


def test_a_measurement_that_time_cut_short_is_not_noted(session: Session):
    ticks = itertools.count()
    chosen = choose_batch_size(session, budget_s=1.0, clock=lambda: float(next(ticks)))
    assert list(chosen.images_per_s) == [1]
    assert not batch_size_cache.BatchSizeCache.of(session).path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"images_per_s": {"8": -1}}', "\0" * 100])
def test_a_damaged_note_is_ignored_with_a_line_and_replaced(
    session: Session, content: str, caplog: pytest.LogCaptureFixture
):
    path = batch_size_cache.BatchSizeCache.of(session).path
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        chosen = choose_quickly(session)
    assert "measured now" in chosen.reason
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert json.loads(path.read_text())["images_per_s"]


def test_a_note_of_other_facts_under_this_name_is_ignored(session: Session, caplog: pytest.LogCaptureFixture):
    choose_quickly(session)
    cache = batch_size_cache.BatchSizeCache.of(session)
    fields = json.loads(cache.path.read_text())
    cache.path.write_text(json.dumps({**fields, "cores": 10_000}))
    assert cache.read() is None
    assert "'cores' is of another measurement" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_note_only(session: Session, caplog: pytest.LogCaptureFixture):
    folder = session.artifact.engines_folder
    folder.write_text("a file where the folder should be")  # also root cannot make a folder here
    with caplog.at_level(logging.INFO):
        assert choose_quickly(session).size >= 1
    assert "the next start measures batch sizes again" in caplog.text


def test_rows_belong_to_all_loaded_tasks_by_turns(session: Session, monkeypatch: pytest.MonkeyPatch):
    slots = {session.lease(task).slot for task in session.tasks}
    seen: list[set[int]] = []
    run = session.run
    monkeypatch.setattr(session, "run", lambda images, rows: seen.append(set(rows.tolist())) or run(images, rows))
    choose_quickly(session)
    assert max(seen, key=len) == slots


def test_a_bundle_without_a_task_is_measured_and_takes_its_first_task_afterwards(session: Session):
    prompt_sets = session.artifact.read_prompt_sets()
    pixels = np.zeros((1, *[session.preprocessing.image_size] * 2, 3), np.uint8)
    with Session.of(session.artifact.with_prompt_sets([]), threads=2) as empty:
        assert empty.tasks == ()
        assert choose_quickly(empty).size >= 1
        for prompt_set in prompt_sets:
            empty.add_task(prompt_set)
        for task in session.tasks:
            found, expected = (each.predict(pixels, task)[0] for each in (empty, session))
            assert found.label == expected.label
            assert found.probability == pytest.approx(expected.probability, rel=1e-4)
