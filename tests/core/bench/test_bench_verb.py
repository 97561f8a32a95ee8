from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpdeploy.backends.ort import OrtBackend
from vpdeploy.bench.benchmark import Choice, run_benchmark
from vpdeploy.bench.rounds import Budget, Settings
from vpdeploy.cli.main import main

Captured = tuple[int, str, str]
RunMain = Callable[..., Captured]

FAST = ("--count", 2, "--warm-up", 0, "--threads", 1)


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunMain:
    """Run the whole entry point in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> Captured:
        monkeypatch.setattr(sys, "argv", ["vpdeploy", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(str(stopped.value.code)), out, err

    return call


def bench(run_main: RunMain, *arguments: object) -> dict[str, Any]:
    code, out, err = run_main(*arguments, *FAST, "--json")
    assert (code, err) == (0, "")
    report: dict[str, Any] = json.loads(out)
    return report


def test_a_bundle_is_measured_in_every_mix(run_main: RunMain, zoo: Path):
    options = ("--batch-sizes", "1,3", "--mix", "one,uniform", "--mix", "zipf", "--mix", "distinct")
    report = bench(run_main, zoo, *options)
    cells = [(each["batch"], each["mix"], each["rounds"]) for each in report["results"]]
    assert cells == [(batch, mix, 2) for batch in (1, 3) for mix in ("one", "uniform", "zipf", "distinct")]
    (subject,) = report["subjects"]
    assert (subject["name"], subject["kind"], subject["tasks"]) == (zoo.name, "bundle", 3)
    assert (subject["runtime"], subject["threads"], subject["precision"]) == ("onnxruntime-cpu", 1, "fp32")
    for result in report["results"]:
        assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"]
        assert result["images_per_s"] > 0
        assert result["ratio"] is None


def test_many_tasks_are_measured_from_a_small_bundle(run_main: RunMain, zoo: Path):
    report = bench(run_main, zoo, "--tasks", 64, "--mix", "distinct", "--batch-sizes", 32)
    (subject,) = report["subjects"]
    assert (subject["tasks"], subject["copied_tasks"], subject["slots"]) == (64, 61, 64)
    assert subject["table_bytes"] == 64 * subject["slot_bytes"]


def test_a_folded_model_against_a_bundle_gives_ratios(run_main: RunMain, zoo: Path, folded_flowers: Path):
    report = bench(run_main, folded_flowers, "--against", zoo, "--batch-sizes", 2)
    first, second = report["results"]
    assert (first["subject"], second["subject"]) == (folded_flowers.name, zoo.name)
    assert first["mix"] == "uniform"
    assert 0 < first["ratio"]["q1"] <= first["ratio"]["median"] <= first["ratio"]["q3"]
    assert [subject["kind"] for subject in report["subjects"]] == ["folded model", "bundle"]


def test_a_runtime_against_itself_measures_the_noise(run_main: RunMain, zoo: Path):
    report = bench(run_main, zoo, "--against-runtime", "onnxruntime-cpu", "--batch-sizes", 1, "--mix", "one")
    assert [subject["name"] for subject in report["subjects"]] == ["zoo (auto)", "zoo (onnxruntime-cpu)"]


def test_text_has_a_line_for_each_result(run_main: RunMain, zoo: Path, folded_flowers: Path):
    code, out, err = run_main(zoo, "--against", folded_flowers, "--batch-sizes", "1,2", *FAST)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("zoo: bundle, onnxruntime-cpu ")
    assert lines[1].startswith("flowers.onnx: folded model, onnxruntime-cpu ")
    assert [line.split()[:3] for line in lines[-4:]] == [
        [batch, "uniform", name] for batch in ("1", "2") for name in ("zoo", "flowers.onnx")
    ]


def test_a_plot_is_written(run_main: RunMain, zoo: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs the train extra")
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow")
    bench(run_main, zoo, "--batch-sizes", "1,2", "--mix", "one,uniform", "--plot", tmp_path / "made" / "bench.png")
    with pillow.open(tmp_path / "made" / "bench.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_lines_of_a_plot_are_the_results(zoo: Path):
    pytest.importorskip("matplotlib", reason="needs the train extra")
    from vpdeploy.bench.picture import draw_benchmark

    budget = Budget(duration_s=None, count=2)
    settings = Settings(batch_sizes=(4, 1), mixes=("one", "uniform"), threads=1, budget=budget, warm_up=0)
    report = run_benchmark((Choice(path=zoo),), settings, clock=time.perf_counter, on_round=lambda share: None)
    latency, throughput = draw_benchmark(report).axes
    by_batch = {(each.cell.mix, each.cell.batch): each for each in report.results}
    assert [line.get_label() for line in throughput.lines] == ["zoo, one", "zoo, uniform"]
    for line, mix in zip(throughput.lines, ("one", "uniform"), strict=True):
        assert line.get_xdata().tolist() == [1, 4]
        assert line.get_ydata().tolist() == [by_batch[mix, batch].images_per_s for batch in (1, 4)]
    assert latency.lines[0].get_ydata().tolist() == [by_batch["one", batch].latency.p50 for batch in (1, 4)]


def test_a_plot_without_its_library_is_refused_before_anything_is_measured(
    run_main: RunMain, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "vpdeploy.bench.picture", raising=False)
    for module in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run_main(zoo, *FAST, "--plot", tmp_path / "x.png")
    assert (code, out) == (3, "")
    assert err == "error: 'matplotlib' is not installed: pip install 'vpdeploy[train]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mix", "random"), "unknown mix 'random'; choose from: one, uniform, zipf, distinct"),
        (("--batch-sizes", "0"), "batch size 0: expected 1 or more"),
        (("--batch-sizes", "1,x"), "--batch-sizes 1,x: expected numbers from 1 with commas between"),
        (("--mix", "distinct", "--batch-sizes", "4"), "a batch of 4 needs 4 tasks, zoo has 3; --tasks 4"),
        (("--runtime", "gpu"), "unknown runtime 'gpu'"),
        (("--against", "none"), "none: does not exist; expected a bundle folder"),
        (("--duration", "0"), "--duration 0.0: expected seconds above 0"),
        (("--duration", "nan"), "--duration nan: expected seconds above 0"),
        (("--duration", "1", "--count", "1"), "--duration and --count exclude each other"),
        (("--plot", "x.pdf"), "--plot x.pdf: expected a name that ends in .png"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_one_line(run_main: RunMain, zoo: Path, arguments: tuple[str, ...], message: str):
    code, out, err = run_main(zoo, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def interrupt_after(monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """Press Ctrl-C in a later run than the given number."""
    done = [0]
    original = OrtBackend.run

    def run(self: OrtBackend, *arguments: Any) -> Any:
        done[0] += 1
        if done[0] > runs:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(OrtBackend, "run", run)


def test_an_interruption_prints_what_was_measured(run_main: RunMain, zoo: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt_after(monkeypatch, 7)
    code, out, err = run_main(zoo, "--batch-sizes", "1,2", "--count", 99, "--warm-up", 0)
    assert (code, err) == (130, "stopped; the report has what was measured by then\n")
    assert "stopped before the end" in out
    code, out, _ = run_main(zoo, "--batch-sizes", "1", "--json")
    assert code == 130
    assert json.loads(out)["interrupted"] is True


def test_an_interruption_counts_complete_rounds(run_main: RunMain, zoo: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt_after(monkeypatch, 7)
    options = ("--batch-sizes", "1,2", "--count", 99, "--warm-up", 1, "--mix", "one", "--json")
    code, out, _ = run_main(zoo, *options)
    # Two runs to warm up; then 1 2, 2 1, 1 in order, of batch size 1 and 2.
    assert code == 130
    assert [(each["batch"], each["rounds"]) for each in json.loads(out)["results"]] == [(1, 3), (2, 2)]


def test_a_failing_run_is_one_line(run_main: RunMain, zoo: Path, monkeypatch: pytest.MonkeyPatch):
    from vpdeploy.errors import BackendError

    def fail(self: OrtBackend, *arguments: Any) -> Any:
        raise BackendError("out of memory")

    monkeypatch.setattr(OrtBackend, "run", fail)
    assert run_main(zoo, *FAST) == (1, "", "error: out of memory\n")
