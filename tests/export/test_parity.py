from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import tiny_runs
from core import toy
from exports import add_to_bundle, export_bundle, export_folded

from vpdeploy import load
from vpdeploy.cli.main import main
from vpdeploy.errors import InputError, ParityError, SpecError
from vpdeploy.format.bundle import Bundle
from vpdeploy_export import parity
from vpdeploy_export.forms import switchable
from vpdeploy_export.images import GATE_IMAGES, gate_images
from vpdeploy_export.parity import (
    TOLERANCES,
    Expectation,
    ParityReport,
    SessionAnswerer,
    compare,
    expected_logits,
    require_parity,
)
from vpdeploy_train.run import Run

Change = Callable[[onnx.ModelProto], None]
Traced = Callable[[Change | None], None]
MakePixels = Callable[..., np.ndarray]

REPORT = ParityReport(
    task="flowers",
    images=10,
    source="10 images",
    runtime="onnxruntime-cpu",
    max_abs_difference=0.001,
    allowed_difference=0.01,
    top1_agreement=1.0,
    undecided=0,
)


class Recorded:
    """Gives one task's answers by the first pixel of each image."""

    runtime = "test"
    mixes_tasks = True

    def __init__(self, answers: np.ndarray) -> None:
        self.answers = answers

    def answer(self, pixels: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
        return self.answers[pixels[:, 0, 0, 0]]


def report_on(expected: np.ndarray, found: np.ndarray, precision: str = "fp32") -> ParityReport:
    pixels = np.zeros((len(expected), 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(len(expected))
    expectation = Expectation(task="t", pixels=pixels, logits=expected.astype(np.float32), source="x")
    tolerance = TOLERANCES[precision].exported  # type: ignore[index]
    (report,) = compare(Recorded(found.astype(np.float32)), [expectation], tolerance=tolerance)
    return report


def test_the_report_states_the_largest_difference_and_what_is_allowed():
    expected = np.array([[4.0, -8.0], [1.0, 0.0]])
    found = expected + np.array([[0.001, 0.0], [0.0, -0.0005]])
    report = report_on(expected, found)
    assert report.max_abs_difference == pytest.approx(0.001, rel=1e-3)
    assert report.allowed_difference == pytest.approx(8 * TOLERANCES["fp32"].exported)
    assert (report.images, report.top1_agreement, report.undecided, report.runtime) == (2, 1.0, 0, "test")
    assert report.passed


def test_small_logits_are_allowed_an_absolute_difference():
    assert report_on(np.zeros((3, 2)), np.zeros((3, 2))).allowed_difference == TOLERANCES["fp32"].exported


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_difference_beyond_the_tolerance_fails(precision: str):
    expected = np.array([[4.0, -8.0]])
    allowed = 8 * TOLERANCES[precision].exported  # type: ignore[index]
    assert report_on(expected, expected + 0.99 * allowed, precision).passed
    assert not report_on(expected, expected + 1.01 * allowed, precision).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["graph", "model", "both"])
def test_answers_that_are_not_finite_never_pass(value: float, where: str):
    good, bad = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [value, 4.0]])
    with np.errstate(invalid="ignore"):
        report = report_on(good if where == "graph" else bad, good if where == "model" else bad)
    assert not report.passed
    with pytest.raises(ParityError):
        require_parity([report])


def test_another_winner_passes_only_where_the_two_best_are_within_twice_the_tolerance():
    allowed = 4 * TOLERANCES["fp32"].exported
    near, far = np.array([[4.0, 4.0 - 0.5 * allowed]]), np.array([[4.0, 3.0]])
    swapped = near[:, ::-1]
    report = report_on(near, swapped)
    assert (report.top1_agreement, report.undecided, report.passed) == (0.0, 1, True)
    assert report_on(far, far).undecided == 0
    assert not replace(REPORT, top1_agreement=0.9, undecided=0).passed
    assert replace(REPORT, top1_agreement=0.9, undecided=1).passed


def test_one_class_has_no_runner_up():
    assert report_on(np.array([[1.0]]), np.array([[1.0]])).passed


def test_the_error_names_the_first_failing_task_and_both_figures():
    failing = replace(REPORT, task="birds", max_abs_difference=0.5)
    with pytest.raises(ParityError, match=r"'birds'.*up to 0\.5 logits \(allowed 0\.01\), top-1 agreement 100\.0%"):
        require_parity([REPORT, failing])
    with pytest.raises(ParityError, match=r"on 10 images; the bundle is as it was$"):
        require_parity([failing], advice="the bundle is as it was")
    require_parity([REPORT])


def test_a_narrower_type_is_allowed_more():
    # float16 has 11 significant bits and bfloat16 8: a step of bfloat16 is 8 of float16's.
    single, half, brain = (TOLERANCES[precision].exported for precision in ("fp32", "fp16", "bf16"))
    assert single < half < brain <= 8 * half


# --- the gate in every export ---


def perturb(model: onnx.ModelProto) -> None:
    """Change one weight of the second block's MLP."""
    tensor = next(each for each in model.graph.initializer if list(each.dims) in ([48, 96], [96, 48]))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3, 5] += 3
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def poison(model: onnx.ModelProto) -> None:
    """Make every answer NaN."""
    tensor = next(each for each in model.graph.initializer if list(each.dims) == [48])
    array = np.full(48, np.nan, np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize("change", [perturb, poison])
def test_a_graph_that_differs_is_not_written(
    traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path, change: Change
):
    traced(change)
    with pytest.raises(ParityError, match="nothing was written"):
        export_folded(tiny_run_paths["flowers"], tmp_path / "flowers.onnx")
    with pytest.raises(ParityError, match="nothing was written"):
        export_bundle(list(tiny_run_paths.values()), tmp_path / "zoo")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_leaves_what_was_there(
    traced: Traced, tiny_run_paths: dict[str, Path], folded_flowers: Path, zoo_copy: Path, tmp_path: Path
):
    traced(perturb)
    out = tmp_path / "flowers.onnx"
    out.write_bytes(folded_flowers.read_bytes())
    before = toy.snapshot(zoo_copy)
    with pytest.raises(ParityError):
        export_folded(tiny_run_paths["flowers"], out)
    with pytest.raises(ParityError):
        export_bundle(list(tiny_run_paths.values()), zoo_copy, existing="replace")
    assert out.read_bytes() == folded_flowers.read_bytes()
    assert toy.snapshot(zoo_copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flowers.onnx", "zoo"]


def test_one_wrong_prompt_set_among_several_is_found(
    traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = switchable.pack

    def compile_wrongly(*arguments: Any, **options: Any) -> Any:
        prompt_set = real(*arguments, **options)
        if prompt_set.card.name != "birds":
            return prompt_set
        tensors = {**prompt_set.tensors, "prefix_value": prompt_set.tensors["prefix_value"][::-1].copy()}
        return replace(prompt_set, tensors=tensors)

    monkeypatch.setattr(switchable, "pack", compile_wrongly)
    with pytest.raises(ParityError, match="task 'birds'"):
        export_bundle(list(tiny_run_paths.values()), tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_a_prompt_set_that_differs_is_not_added(
    tiny_run_paths: dict[str, Path], zoo_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parity, "expected_logits", lambda *arguments: expected_logits(*arguments) + 1)
    before = toy.snapshot(zoo_copy)
    with pytest.raises(ParityError, match="task 'flowers'"):
        add_to_bundle(zoo_copy, tiny_run_paths["flowers"])
    assert toy.snapshot(zoo_copy) == before


def test_the_command_exits_4_with_one_line(
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    traced(perturb)
    out = tmp_path / "flowers.onnx"
    monkeypatch.setattr(sys, "argv", ["vpdeploy", "export", str(tiny_run_paths["flowers"]), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: task 'flowers': the exported graph differs")
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_the_gate_compares_the_tasks_mixed_in_one_table(zoo: Path, tiny_run_paths: dict[str, Path]):
    expectations = []
    for seed, path in enumerate(tiny_run_paths.values()):
        run = Run.read(path)
        pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed, 32, 32, 3), dtype=np.uint8)
        logits = expected_logits(run.load_model(run.load_backbone()), pixels, run.card.preprocessing)
        expectations.append(Expectation(task=run.card.name, pixels=pixels, logits=logits, source="x"))
    with load(zoo, threads=1) as session:
        answerer = SessionAnswerer(session=session)
        reports = compare(answerer, expectations, tolerance=2e-4)
        assert all(report.passed for report in reports)
        assert [report.images for report in reports] == [9, 10, 11]
        # Prompts that get mixed up are found.
        mixed = [replace(expectations[0], logits=expectations[1].logits[:9, :4]), *expectations[1:]]
        assert [report.passed for report in compare(answerer, mixed, tolerance=2e-4)] == [False, True, True]


# --- its images ---


@pytest.fixture
def picture_folder(tmp_path: Path, random_pixels: MakePixels) -> Path:
    """Twenty images of four classes in two levels of folders."""
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    for index, pixels in enumerate(random_pixels(20)):
        path = folder / f"flowers-{index % 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(pixels).save(path)
    return folder


def test_the_runs_own_validation_images_are_used_and_named(picture_folder: Path, tiny_run_paths: dict[str, Path]):
    run = replace(Run.read(tiny_run_paths["flowers"]), data=str(picture_folder), val_fraction=0.25)
    chosen = gate_images(run, None)
    # 5 images a class: 1 for test, and 1 of the other 4 for validation.
    assert chosen.pixels.shape == (4, 32, 32, 3)
    assert chosen.source.startswith("4 validation images of ")
    assert chosen.source.endswith("pictures")


def test_synthetic_images_stand_in_and_say_why(tiny_run_paths: dict[str, Path]):
    run = Run.read(tiny_run_paths["flowers"])
    chosen, again = gate_images(run, None), gate_images(run, None)
    assert chosen.source.startswith("32 synthetic images (the run's own are not available: ")
    assert "its data 'images' is not there" in chosen.source
    assert "--images DIR" in chosen.source
    assert "/nowhere" not in chosen.source
    np.testing.assert_array_equal(chosen.pixels, again.pixels)
    assert chosen.pixels.std() > 40


def test_given_images_are_used_and_spread_over_the_folder(picture_folder: Path, tiny_run_paths: dict[str, Path]):
    run = Run.read(tiny_run_paths["flowers"])
    chosen = gate_images(run, picture_folder)
    assert (chosen.pixels.shape[0], chosen.source) == (20, "20 images of pictures")
    for index in range(100):
        source = picture_folder / "flowers-0" / "0.png"
        (picture_folder / "flowers-0" / f"more-{index}.png").write_bytes(source.read_bytes())
    assert len(gate_images(run, picture_folder).pixels) == GATE_IMAGES


def test_given_images_that_cannot_be_used_are_an_error(
    picture_folder: Path, tiny_run_paths: dict[str, Path], tmp_path: Path
):
    run = Run.read(tiny_run_paths["flowers"])
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        with pytest.raises(SpecError, match=f"--images .*{folder}: no image files found"):
            gate_images(run, tmp_path / folder)
    (picture_folder / "broken.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"--images: .*broken\.png: not a readable image"):
        gate_images(run, picture_folder)


def test_the_source_of_the_images_is_kept_with_what_was_exported(
    traced: Traced, tiny_run_paths: dict[str, Path], picture_folder: Path, tmp_path: Path
):
    report = export_folded(tiny_run_paths["flowers"], tmp_path / "flowers.onnx", images=picture_folder)
    export_bundle([tiny_run_paths["flowers"]], tmp_path / "zoo", images=picture_folder)
    (parity,) = report.parity
    assert (parity.images, parity.source) == (20, "20 images of pictures")
    (entry,) = onnx.load(tmp_path / "flowers.onnx").metadata_props
    assert json.loads(entry.value)["task"]["details"]["parity"] == parity.to_fields()
    stored = Bundle.open(tmp_path / "zoo").read_task("flowers").card.details["parity"]
    assert stored["source"] == "20 images of pictures"
    assert stored["max_abs_difference"] <= stored["allowed_difference"]


def test_expected_logits_do_not_depend_on_batches(tiny_run_paths: dict[str, Path], random_pixels: MakePixels):
    run = Run.read(tiny_run_paths["birds"])
    model = run.load_model(run.load_backbone())
    pixels = random_pixels(20)
    whole = expected_logits(model, pixels, tiny_runs.PREPROCESSING)
    parts = [expected_logits(model, pixels[index : index + 1], tiny_runs.PREPROCESSING)[0] for index in range(20)]
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)
