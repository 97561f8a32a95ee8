from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from core import toy

from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.bench import deployed
from vpdeploy.bench.deployed import DeployedSubject, fill_up
from vpdeploy.bench.subject import Cell
from vpdeploy.errors import SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.table import Table


class RecordingBackend:
    """Runs nothing and remembers which slots were asked for."""

    name = "recording"
    input_dtype = np.dtype(np.uint8)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.images: list[npt.NDArray[np.generic]] = []
        self.table: Table | None = None

    def bind_table(self, table: Table) -> None:
        self.table = table

    def run(self, images: npt.NDArray[np.generic], slots: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        self.batches.append(slots.tolist())
        self.images.append(images)
        return np.zeros((len(images), 4), dtype=np.float32)

    def describe(self) -> RuntimeDescription:
        return RuntimeDescription(name=self.name, version="1.0", reason="asked for", threads=None)

    def close(self) -> None:
        pass


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RecordingBackend:
    recording = RecordingBackend()
    monkeypatch.setattr(deployed, "open_backend", lambda graph, *, runtime, threads: recording)
    return recording


@pytest.fixture
def load(tmp_path: Path, backend: RecordingBackend) -> Callable[..., DeployedSubject]:
    """Load a bundle of two tasks."""
    artifact = Artifact.open(toy.write(tmp_path / "zoo").path)

    def call(tasks: int | None = None) -> DeployedSubject:
        return DeployedSubject(artifact, name="zoo", runtime="auto", threads=None, tasks=tasks)

    return call


def batches(subject: DeployedSubject, backend: RecordingBackend, mix: str, *, batch: int, runs: int) -> list[list[int]]:
    backend.batches.clear()
    run = subject.prepare(Cell(batch=batch, mix=mix), 0)
    for _ in range(runs):
        run()
    return backend.batches


def test_rows_of_distinct_all_have_slots_of_their_own(load: Callable[..., DeployedSubject], backend: RecordingBackend):
    for slots in batches(load(64), backend, "distinct", batch=32, runs=40):
        assert len(set(slots)) == 32
        assert set(slots) <= set(range(64))


def test_rows_of_one_share_a_slot(load: Callable[..., DeployedSubject], backend: RecordingBackend):
    assert batches(load(), backend, "one", batch=4, runs=3) == [[0] * 4] * 3


def test_batches_of_a_random_mix_differ_from_each_other(
    load: Callable[..., DeployedSubject], backend: RecordingBackend
):
    drawn = batches(load(64), backend, "uniform", batch=8, runs=16)
    assert len(set(map(tuple, drawn))) == 16


def test_the_same_seed_measures_the_same_batches(load: Callable[..., DeployedSubject], backend: RecordingBackend):
    subject = load(64)
    first = list(batches(subject, backend, "zipf", batch=8, runs=4))
    assert batches(subject, backend, "zipf", batch=8, runs=4) == first
    np.testing.assert_array_equal(backend.images[0], backend.images[-1])


def test_a_table_is_filled_up_with_copies_of_the_tasks(load: Callable[..., DeployedSubject], backend: RecordingBackend):
    subject = load(5)
    assert backend.table is not None
    assert (subject.tasks, backend.table.slots) == (5, 5)
    keys = backend.table.arrays["prefix_key"]
    np.testing.assert_array_equal(keys[2], keys[0])
    np.testing.assert_array_equal(keys[3], keys[1])
    np.testing.assert_array_equal(keys[4], keys[0])
    assert not np.array_equal(keys[0], keys[1])
    facts = subject.facts()
    assert (facts.tasks, facts.copied_tasks, facts.table_bytes) == (5, 3, backend.table.size_bytes)


def test_a_table_may_hold_fewer_tasks_than_the_bundle(load: Callable[..., DeployedSubject], backend: RecordingBackend):
    subject = load(1)
    assert (subject.tasks, subject.facts().copied_tasks) == (1, 0)
    with pytest.raises(SpecError, match="at least 2 tasks"):
        subject.prepare(Cell(batch=1, mix="uniform"), 0)


def test_too_few_tasks_for_distinct_rows_are_refused(load: Callable[..., DeployedSubject]):
    with pytest.raises(SpecError, match="a batch of 3 needs 3 tasks, zoo has 2; --tasks 3 fills a bundle up"):
        load().prepare(Cell(batch=3, mix="distinct"), 0)


def test_a_bundle_without_tasks_cannot_be_measured(tmp_path: Path, backend: RecordingBackend):
    path = toy.write(tmp_path / "zoo", toy.prompt_set()).path
    toy.withdraw_task(path, "flowers")
    with pytest.raises(SpecError, match="holds no task; add one with vpdeploy task add"):
        DeployedSubject(Artifact.open(path), name="zoo", runtime="auto", threads=None, tasks=None)


def test_copies_have_names_of_their_own():
    sets = [toy.prompt_set("copy-1"), toy.prompt_set("birds")]
    filled = fill_up(sets, 6)
    names = [prompt_set.card.name for prompt_set in filled]
    assert names[:2] == ["copy-1", "birds"]
    assert len(set(names)) == 6
    assert filled[2].tensors is sets[0].tensors
    assert fill_up(sets, 1) == sets[:1]


def test_facts_name_the_graph_and_the_runtime(load: Callable[..., DeployedSubject]):
    facts = load().facts()
    assert (facts.kind, facts.runtime.name, facts.precision) == ("bundle", "recording", "fp32")
    assert (facts.opset, facts.graph_bytes, facts.image_size) == (20, len(b"not a graph"), (8, 8))
