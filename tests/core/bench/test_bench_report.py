from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vpdeploy.backends.description import DeviceMemory, LoadedEngine, RuntimeDescription
from vpdeploy.bench.benchmark import Choice, cells_of, names_of
from vpdeploy.bench.report import BenchmarkReport, render_benchmark
from vpdeploy.bench.rounds import Contest, Ratio, Settings
from vpdeploy.bench.subject import BatchRun, Cell, SubjectFacts
from vpdeploy.errors import SpecError


class FakeSubject:
    def __init__(
        self, name: str, *, tasks: int = 1, fixed_batch: int | None = None, engine: LoadedEngine | None = None
    ) -> None:
        self.name = name
        self.engine = engine
        self.tasks = tasks
        self.fixed_batch = fixed_batch

    def prepare(self, cell: Cell, seed: int) -> BatchRun:
        return lambda: None

    def facts(self) -> SubjectFacts:
        reason = "tensorrt: no NVIDIA driver; fastest that works here" if self.tasks > 1 else "asked for"
        return SubjectFacts(
            name=self.name,
            kind="bundle" if self.tasks > 1 else "ONNX file",
            path=f"/models/{self.name}",
            opset=None,
            graph_bytes=172_000_000,
            input="uint8",
            tasks=self.tasks,
            copied_tasks=self.tasks - 3 if self.tasks > 3 else 0,
            runtime=RuntimeDescription(
                name="onnxruntime-cpu", version="1.31.1", reason=reason, threads=None, engine=self.engine
            ),
            precision=None,
            image_size=(224, 112),
            table_bytes=1500,
        )

    def close(self) -> None:
        pass


def measured(*rounds: tuple[float, ...], batch: int = 8) -> Contest:
    contest = Contest(cell=Cell(batch=batch, mix="uniform"), runs=[])
    for times in rounds:
        contest.add_round(times)
    return contest


def report(
    *contests: Contest, tasks: int = 64, interrupted: bool = False, engine: LoadedEngine | None = None
) -> BenchmarkReport:
    subjects = [FakeSubject("zoo", tasks=tasks, engine=engine), FakeSubject("plain.onnx")]
    return BenchmarkReport.of(subjects, contests, Settings(), interrupted=interrupted)


ROUNDS = ((0.01, 0.02), (0.03, 0.04), (0.02, 0.02))


def test_results_are_of_each_cell_and_subject():
    found = report(measured(*ROUNDS, batch=1), measured(*ROUNDS, batch=8)).results
    assert [(each.cell.batch, each.subject, each.rounds) for each in found] == [
        (1, "zoo", 3),
        (1, "plain.onnx", 3),
        (8, "zoo", 3),
        (8, "plain.onnx", 3),
    ]
    assert found[2].latency.mean == pytest.approx(20.0)
    assert found[2].images_per_s == pytest.approx(24 / 0.06)
    # Ratios of the rounds: 0.5, 0.75, 1.
    assert found[2].ratio == Ratio(median=0.75, q1=0.625, q3=0.875)
    assert found[3].ratio is None


def test_cells_without_a_complete_round_are_left_out():
    found = report(measured(*ROUNDS, batch=1), measured(batch=8), interrupted=True)
    assert [each.cell.batch for each in found.results] == [1, 1]
    assert "stopped before the end" in render_benchmark(found)


def test_a_report_is_json():
    found = report(measured(*ROUNDS)).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["machine", "settings", "interrupted", "subjects", "peak_memory_bytes", "results"]
    assert found["settings"] == {"duration_s": 5.0, "count": None, "warm_up": 3, "seed": 0, "tasks": None}
    assert found["subjects"][0] == {
        "name": "zoo",
        "kind": "bundle",
        "path": "/models/zoo",
        "opset": None,
        "graph_bytes": 172_000_000,
        "input": "uint8",
        "tasks": 64,
        "copied_tasks": 61,
        "runtime": "onnxruntime-cpu",
        "runtime_version": "1.31.1",
        "reason": "tensorrt: no NVIDIA driver; fastest that works here",
        "threads": None,
        "precision": None,
        "image_size": [224, 112],
        "table_bytes": 1500,
    }
    assert list(found["results"][0]) == [
        *("subject", "batch", "mix", "rounds", "latency_ms", "images_per_s", "ratio"),
    ]
    assert found["results"][0]["ratio"] == {"median": 0.75, "q1": 0.625, "q3": 0.875}


def test_text_says_what_was_measured_and_what_is_not_known():
    text = render_benchmark(report(measured(*ROUNDS)))
    first, second, why, place, memory, empty, header, *rows = text.splitlines()
    assert first == (
        "zoo: bundle, onnxruntime-cpu 1.31.1, threads as the runtime chooses, precision unknown, opset unknown, "
        "graph 172 MB, image uint8 224x112, 64 tasks, 61 of them copies, in a table of 1.5 kB"
    )
    assert "tasks" not in second
    assert why == "why onnxruntime-cpu: tensorrt: no NVIDIA driver; fastest that works here"
    assert "cores" in place
    assert memory.startswith("peak memory of this process: ")
    assert empty == ""
    assert header.split()[:9] == ["batch", "mix", "model", "rounds", "mean", "ms", "p50", "p90", "p99"]
    assert header.endswith("time ratio to plain.onnx (quartiles)")
    assert rows[0].split() == ["8", "uniform", "zoo", "3", "20", "20", "28", "29.8", "400", "0.750", "(0.625-0.875)"]
    assert rows[1].split()[-1] == "300"


def test_text_says_which_engine_ran_and_what_it_takes_on_the_gpu():
    memory = DeviceMemory(weights=100_000_000, table=20_000, staging=0, contexts=30_000_000, pinned_host=0)
    engine = LoadedEngine(
        gpu="NVIDIA L4 (sm_89)",
        file="KEY.engine",
        batch_sizes=(1, 2),
        contexts=2,
        cuda_graphs="0 captured",
        memory=memory,
    )
    first = render_benchmark(report(measured(*ROUNDS), engine=engine)).splitlines()[0]
    assert first.endswith("in a table of 1.5 kB, 130 MB on the GPU, engine KEY.engine")


# --- cells ---


def cells(*subjects: FakeSubject, **settings: Any) -> list[tuple[int, str]]:
    return [(cell.batch, cell.mix) for cell in cells_of(list(subjects), Settings(**settings))]


def test_every_batch_size_meets_every_mix_once():
    found = cells(FakeSubject("zoo", tasks=9), batch_sizes=(1, 8, 1), mixes=("one", "zipf", "one"))
    assert found == [(1, "one"), (1, "zipf"), (8, "one"), (8, "zipf")]


def test_rows_are_mixed_by_default_where_there_are_tasks_to_mix():
    assert cells(FakeSubject("zoo", tasks=2)) == [(1, "uniform"), (8, "uniform"), (32, "uniform")]
    assert cells(FakeSubject("x.onnx")) == [(1, "one"), (8, "one"), (32, "one")]
    assert cells(FakeSubject("x.onnx"), FakeSubject("zoo", tasks=2), batch_sizes=(4,)) == [(4, "uniform")]


def test_a_fixed_batch_is_the_default():
    assert cells(FakeSubject("zoo", tasks=2), FakeSubject("x.onnx", fixed_batch=4)) == [(4, "uniform")]


def test_another_batch_than_the_fixed_one_is_refused():
    with pytest.raises(SpecError, match="x.onnx: its batch size is fixed to 4, found 8; give --batch-sizes 4"):  # noqa: RUF043
        cells(FakeSubject("x.onnx", fixed_batch=4), batch_sizes=(4, 8))


def test_one_task_cannot_be_mixed():
    with pytest.raises(SpecError, match="--mix zipf: there is one task in a and in b; give --mix one"):
        cells(FakeSubject("a"), FakeSubject("b"), mixes=("one", "zipf"))


def test_a_number_of_tasks_needs_a_table():
    with pytest.raises(SpecError, match="--tasks 64: only a bundle's table can be filled up"):
        cells(FakeSubject("a"), tasks=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": (1, 0)}, "batch size 0: expected 1 or more"),
        ({"mixes": ("one", "none")}, "unknown mix 'none'; choose from: one, uniform, zipf, distinct"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        Settings(**settings).check()


def test_names_tell_the_subjects_apart():
    def names(*choices: tuple[str, str]) -> list[str]:
        return names_of(tuple(Choice(path=Path(path), runtime=runtime) for path, runtime in choices))

    assert names(("a/zoo", "auto")) == ["zoo"]
    assert names(("a/zoo", "auto"), ("b/x.onnx", "auto")) == ["zoo", "x.onnx"]
    assert names(("zoo", "auto"), ("zoo", "tensorrt")) == ["zoo (auto)", "zoo (tensorrt)"]
    assert names(("zoo", "auto"), ("zoo", "auto")) == ["zoo A", "zoo B"]
    assert names(("a/x.onnx", "auto"), ("b/x.onnx", "tensorrt")) == ["a/x.onnx", "b/x.onnx"]
