"""``vpdeploy verify``: the gate once more, on other images and runtimes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from exports import export_bundle, export_folded
from test_precision_bisection import scale_weight

from vpdeploy.backends import RUNTIMES, Runtime
from vpdeploy.cli.main import main
from vpdeploy.errors import BackendError, LayoutMismatchError, ParityError, SpecError
from vpdeploy_export.export import ExportReport
from vpdeploy_export.models import TrainedModel
from vpdeploy_export.verification import verify

CPU = ("onnxruntime-cpu",)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vpdeploy", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def brain_zoo(tmp_path_factory: pytest.TempPathFactory, tiny_run_paths: dict[str, Path]) -> Path:
    """All the runs as a bundle in bfloat16."""
    out = tmp_path_factory.mktemp("brain") / "zoo"
    return export_bundle(list(tiny_run_paths.values()), out, precision="bf16").path


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory: pytest.TempPathFactory, random_pixels) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    for index, pixels in enumerate(random_pixels(9)):
        pillow.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def models_of(*runs: Path) -> list[TrainedModel]:
    return TrainedModel.of_runs(runs)


def test_a_bundle_is_compared_with_the_runs_it_came_from(zoo: Path, tiny_run_paths: dict[str, Path]):
    report = verify(zoo, models=models_of(tiny_run_paths["birds"], tiny_run_paths["flowers"]), runtimes=CPU)
    assert [(each.task, each.images, each.passed) for each in report.parity] == [
        ("birds", 32, True),
        ("flowers", 32, True),
    ]
    assert all(0 < each.max_abs_difference < each.allowed_difference for each in report.parity)
    assert all("synthetic images (the run's own are not available" in each.source for each in report.parity)
    report.require()


def test_without_runs_a_narrow_graph_is_compared_with_its_own_float32(half_zoo: ExportReport, picture_folder: Path):
    report = verify(half_zoo.path, images=picture_folder, runtimes=[*CPU, "emulated"])
    assert report.reference == "its own arithmetic in float32"
    assert [(each.runtime, each.task) for each in report.parity] == [
        (runtime, task)
        for runtime in ("onnxruntime-cpu", "onnxruntime-cpu, float16 emulated")
        for task in ("flowers", "birds", "probe")
    ]
    assert {(each.images, each.passed) for each in report.parity} == {(9, True)}
    assert {each.source for each in report.parity} == {f"9 images of {picture_folder.name}"}
    assert all(each.max_abs_difference > 0 for each in report.parity)


def test_a_float32_graph_is_its_own_reference(folded_flowers: Path):
    (report,) = verify(folded_flowers, runtimes=CPU).parity
    assert report.max_abs_difference < 1e-5  # batches of other sizes sum in another order
    assert report.source == "32 synthetic images (give real ones with --images or --run)"


def test_another_runs_answers_are_missed(zoo: Path, tiny_weights: Path, tmp_path: Path):
    kept = tiny_runs.ragged_kept([[0, 3, 7], [], [1]], [[0, 2], [4], [1, 3]])
    other = tiny_runs.write_run(tmp_path / "other", tiny_weights, name="flowers", classes=4, kept=kept, seed=99)
    report = verify(zoo, models=models_of(other.path), runtimes=CPU)
    with pytest.raises(ParityError, match=r"task 'flowers' on onnxruntime-cpu differs from the trained model by up to"):
        report.require()


def test_runs_that_do_not_belong_to_the_artifact_are_refused(
    zoo: Path, folded_flowers: Path, tiny_run_paths: dict[str, Path], tiny_weights: Path, tmp_path: Path
):
    flowers, birds = tiny_run_paths["flowers"], tiny_run_paths["birds"]
    with pytest.raises(SpecError, match=r"birds: task 'birds' is not in .*flowers\.onnx; it holds: flowers"):
        verify(folded_flowers, models=models_of(birds), runtimes=CPU)
    with pytest.raises(SpecError, match="a run of task 'flowers' was given already"):
        verify(zoo, models=models_of(flowers, flowers), runtimes=CPU)
    other = tiny_runs.write_weights(tmp_path / "other.safetensors", seed=5)
    foreign = tiny_runs.write_run(tmp_path / "a", other, name="flowers", classes=4, kept=None, method="linear")
    with pytest.raises(
        LayoutMismatchError, match=r"has backbone vit_fixture_patch8_32.*give the run that was exported"
    ):
        verify(zoo, models=models_of(foreign.path), runtimes=CPU)
    more = tiny_runs.write_run(tmp_path / "b", tiny_weights, name="flowers", classes=9, kept=None, method="linear")
    with pytest.raises(LayoutMismatchError, match="has 9 labels that are not the 4 of"):
        verify(zoo, models=models_of(more.path), runtimes=CPU)


def test_a_runtime_that_does_not_work_here_is_an_error(zoo: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setitem(RUNTIMES, "onnxruntime-cuda", Runtime(obstacle=lambda _: "no driver", open=fail))  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="runtime 'onnxruntime-cuda' does not work here: no driver"):
        verify(zoo, runtimes=[*CPU, "onnxruntime-cuda"])
    with pytest.raises(SpecError, match="unknown runtime 'quantum'"):
        verify(zoo, runtimes=["quantum"])


def test_a_bfloat16_graph_is_compared_by_emulation(brain_zoo: Path, tiny_run_paths: dict[str, Path]):
    with pytest.raises(BackendError, match="no bfloat16 kernels"):
        verify(brain_zoo, runtimes=CPU)
    report = verify(brain_zoo, models=models_of(*tiny_run_paths.values()), runtimes=["emulated"], bisects=True)
    assert {each.runtime for each in report.parity} == {"onnxruntime-cpu, bfloat16 emulated"}
    assert [each.task for each in report.parity] == ["flowers", "birds", "probe"]
    report.require()
    assert report.bisection is not None
    assert report.bisection.first is None
    assert max(each.relative_error for each in report.bisection.deviations) > 2**-9


def test_nothing_stands_in_for_float32(folded_flowers: Path):
    with pytest.raises(SpecError, match=r"--runtime emulated: .* is float32, which nothing has to stand in for"):
        verify(folded_flowers, runtimes=["emulated"])


def test_the_command_prints_a_table(command: Command, zoo: Path, tiny_run_paths: dict[str, Path]):
    code, out, err = command(zoo, "--run", tiny_run_paths["flowers"], "--runtime", "onnxruntime-cpu")
    title, header, row, source = out.splitlines()
    assert (code, err) == (0, "")
    assert title == f"{zoo} against the trained model"
    assert header.split() == ["task", "images", "runtime", "max", "|Δ", "logit|", "allowed", "top-1"]
    assert row.split()[:3] == ["flowers", "32", "onnxruntime-cpu"]
    assert row.split()[-1] == "100.0%"
    assert source.startswith("  images: 32 synthetic images")


def test_the_default_is_the_runtime_that_auto_picks(command: Command, folded_flowers: Path):
    code, out, _ = command(folded_flowers, "--json")
    assert code == 0
    assert json.loads(out)["parity"][0]["runtime"] in RUNTIMES


def test_a_missed_comparison_exits_4_and_names_what_to_try(command: Command, half_folded: ExportReport, tmp_path: Path):
    path = scale_weight(half_folded.path, tmp_path / "poisoned.onnx", "blocks.1.mlp.fc1.weight", 3e4)
    code, out, err = command(path, "--runtime", "emulated")
    assert code == 4
    assert "MISSED" in out
    assert err.count("\n") == 1
    assert err.startswith("error: task 'flowers' on onnxruntime-cpu, float16 emulated differs from its own arithmetic")
    assert err.endswith(f"find the layer with vpdeploy verify {path} --bisect\n")
    code, out, err = command(path, "--runtime", "emulated", "--bisect")
    assert code == 4
    assert "block 1, mlp (blocks.1.mlp.fc1.MatMul) is the first value out of tolerance" in err
    (line,) = [line for line in out.splitlines() if "blocks.1.mlp.fc1" in line and "MISSED" in line]
    assert line.split()[:5] == ["1", "mlp", "blocks.1.mlp.fc1.MatMul", "not", "finite"]


def test_the_report_is_json(command: Command, half_folded: ExportReport, tmp_path: Path):
    path = scale_weight(half_folded.path, tmp_path / "poisoned.onnx", "blocks.1.mlp.fc1.weight", 3e4)
    code, out, _ = command(path, "--runtime", "emulated", "--bisect", "--json")
    report = json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert code == 4
    assert report["parity"][0]["passed"] is False
    assert report["parity"][0]["max_abs_difference"] is None
    assert report["bisection"]["first"]["value"] == "blocks.1.mlp.fc1.MatMul"
    assert report["bisection"]["first"]["relative_error"] is None


def test_normalised_images_are_verified_too(tiny_run_paths: dict[str, Path], tmp_path: Path):
    run = tiny_run_paths["flowers"]
    path = export_folded(run, tmp_path / "flowers.onnx", precision="fp16", image_input="float").path
    report = verify(path, models=models_of(run), runtimes=["emulated", *CPU], bisects=True)
    report.require()
    assert report.bisection is not None
    assert report.bisection.first is None
