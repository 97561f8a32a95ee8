from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from core import toy
from exports import add_to_bundle, export_bundle, export_folded

from vpdeploy import load
from vpdeploy.backends import providers
from vpdeploy.cli.main import main
from vpdeploy.errors import BundleCorruptError, BundleError, LayoutMismatchError, SpecError
from vpdeploy.format import bundle as bundle_module
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, collect_leftovers, write_bundle
from vpdeploy.format.layout import Layout
from vpdeploy.format.task import Stage
from vpdeploy.session.session import Session
from vpdeploy_export import export
from vpdeploy_export.export import ExportReport
from vpdeploy_export.forms import folded, switchable
from vpdeploy_export.parity import TOLERANCES, expected_logits
from vpdeploy_train.run import Run

MakePixels = Callable[..., np.ndarray]
Traced = Callable[[None], None]
Command = Callable[..., tuple[int, str, str]]

TASKS = ("flowers", "birds", "probe")
OTHER_SIZE = replace(tiny_runs.PREPROCESSING, image_size=64)


@pytest.fixture(scope="module")
def trained(tiny_run_paths: dict[str, Path], random_pixels: MakePixels) -> dict[str, np.ndarray]:
    """What each trained PyTorch model answers to the same images."""
    answers = {}
    for name, path in tiny_run_paths.items():
        run = Run.read(path)
        answers[name] = expected_logits(run.load_model(run.load_backbone()), random_pixels(6), run.card.preprocessing)
    return answers


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the entry point in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vpdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(str(stopped.value.code)), out, err

    return call


def answers(session: Session, task: str, pixels: np.ndarray) -> np.ndarray:
    with session.lease(task) as lease:
        rows = session.run(pixels, np.full(len(pixels), lease.slot, np.int32))
        return rows[:, : len(lease.card.labels)]


def visible(folder: Path) -> list[str]:
    """Names a user sees: unfinished work has a name that starts with a dot."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# --- the same answers everywhere ---


@pytest.mark.parametrize("opset", [20, 23])
def test_folded_bundle_and_trained_model_agree(
    zoo: Path,
    folded_flowers: Path,
    fused_zoo: ExportReport,
    fused_folded: ExportReport,
    trained: dict[str, np.ndarray],
    random_pixels: MakePixels,
    opset: int,
):
    bundle, folded = (zoo, folded_flowers) if opset == 20 else (fused_zoo.path, fused_folded.path)
    scale = max(np.abs(each).max() for each in trained.values())
    with load(bundle, threads=1) as session:
        for task in TASKS:
            found = answers(session, task, random_pixels(6))
            np.testing.assert_allclose(found, trained[task], rtol=0, atol=1e-5 * scale)
    with load(folded, threads=1) as session:
        found = answers(session, "flowers", random_pixels(6))
        np.testing.assert_allclose(found, trained["flowers"], rtol=0, atol=1e-5 * scale)


def test_half_precision_stays_within_its_stated_tolerance(
    half_zoo: ExportReport, half_folded: ExportReport, trained: dict[str, np.ndarray], random_pixels: MakePixels
):
    for path in (half_zoo.path, half_folded.path):
        with load(path, threads=1) as session:
            assert session.describe().precision == "fp16"
            for task in session.tasks:
                difference = np.abs(answers(session, task, random_pixels(6)) - trained[task]).max()
                assert 0 < difference <= TOLERANCES["fp16"].exported * max(1, np.abs(trained[task]).max())


def test_the_report_says_what_was_written(half_zoo: ExportReport, zoo: Path):
    assert (half_zoo.precision, half_zoo.opset) == ("fp16", 20)
    assert half_zoo.size_bytes == (half_zoo.path / "model.onnx").stat().st_size
    bundle = Bundle.open(half_zoo.path)
    assert half_zoo.prompt_bytes == {task: bundle.read_task(task).size_bytes for task in TASKS}
    # Keys and values of the longest block in each of 3 blocks, 2 bytes each; bias and head of 4 bytes.
    assert half_zoo.prompt_bytes["birds"] == 2 * 2 * 3 * 10 * 48 + 4 * (3 * 10 + 48 * 7 + 7)
    assert half_zoo.prompt_bytes["probe"] == 4 * (48 * 2 + 2)
    assert [report.task for report in half_zoo.parity] == list(TASKS)
    assert all(report.passed for report in half_zoo.parity)
    json.dumps(half_zoo.to_fields())


def test_a_folded_report_counts_what_the_prompts_cost(half_folded: ExportReport):
    # Prompts without padding: 5 + 1 + 3 columns of keys and values, 2 bytes each; the head of 4 bytes.
    assert half_folded.prompt_bytes == {"flowers": 2 * 2 * (5 + 1 + 3) * 48 + 4 * (48 * 4 + 4)}


def test_a_graph_for_normalised_floats_gives_the_same_through_the_session_and_profiles_of_its_form(
    command: Command,
    tiny_run_paths: dict[str, Path],
    trained: dict[str, np.ndarray],
    random_pixels: MakePixels,
    tmp_path: Path,
):
    out = tmp_path / "flowers.onnx"
    code, _, err = command("export", tiny_run_paths["flowers"], "--out", out, "--input", "float")
    assert code == 0, err
    scale = np.abs(trained["flowers"]).max()
    with load(out, threads=1) as session:
        found = answers(session, "flowers", random_pixels(6))
    np.testing.assert_allclose(found, trained["flowers"], rtol=0, atol=2e-5 * scale)
    options = providers.tensorrt_options(Artifact.open(out))
    assert options["trt_profile_min_shapes"] == "image:1x3x32x32"
    assert options["trt_profile_max_shapes"] == "image:32x3x32x32"


# --- what does not go together ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "flowers"}, "are both task 'flowers'; train one with another --name"),
        ({"preprocessing": OTHER_SIZE, "image_size": 64}, "preprocess differently: image_size 32 != 64"),
        (
            {"preprocessing": replace(tiny_runs.PREPROCESSING, mean=(0.5, 0.5, 0.5))},
            r"preprocess differently: mean \[0\.5, 0\.4, 0\.3\] != \[0\.5, 0\.5, 0\.5\]",
        ),
        ({"weights": 7}, f"different weights of {tiny_runs.NAME}"),
    ],
    ids=["name", "image size", "normalisation", "weights"],
)
def test_runs_that_do_not_go_together_are_refused_by_name(
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    tiny_weights: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
):
    options: dict[str, Any] = {"name": "other", "classes": 3, "kept": None, "method": "linear", **change}
    weights = tiny_weights
    if seed := options.pop("weights", None):
        weights = tiny_runs.write_weights(tmp_path / "other.safetensors", seed=seed)
    tiny_runs.write_run(tmp_path / "other", weights, **options)
    with pytest.raises(SpecError, match=f"flowers and .*other .*{message}"):
        export_bundle([tiny_run_paths["flowers"], tmp_path / "other"], tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_another_architecture_is_refused_by_name(traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path):
    run = Run.read(tiny_run_paths["birds"])
    renamed = replace(run.card, backbone=replace(run.card.backbone, name="vit_other"))
    replace(run, path=tmp_path / "other", card=renamed).write()
    with pytest.raises(SpecError, match=f"different backbones: {tiny_runs.NAME} and vit_other"):
        export_bundle([tiny_run_paths["flowers"], tmp_path / "other"], tmp_path / "zoo")


def test_weights_that_are_not_those_of_the_run_are_refused(tiny_run_paths: dict[str, Path], tmp_path: Path):
    other = tiny_runs.write_weights(tmp_path / "other.safetensors", seed=5)
    with pytest.raises(SpecError, match="give the original ones with --weights"):
        export_folded(tiny_run_paths["flowers"], tmp_path / "x.onnx", weights=other)


def test_moved_weights_are_found_where_the_option_says(
    traced: Traced, tiny_run_paths: dict[str, Path], tiny_weights: Path, tmp_path: Path
):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(tiny_weights.read_bytes())
    run = replace(Run.read(tiny_run_paths["flowers"]), path=tmp_path / "run", weights="/nowhere/w.safetensors")
    run.write()
    with pytest.raises(SpecError, match=r"/nowhere/w\.safetensors: weights file not found"):
        export_folded(tmp_path / "run", tmp_path / "x.onnx")
    assert export_folded(tmp_path / "run", tmp_path / "x.onnx", weights=moved).parity[0].passed


@pytest.mark.parametrize("damage", ["card", "tensors", "no card"])
def test_a_damaged_run_is_refused_by_its_file(tiny_run_paths: dict[str, Path], tmp_path: Path, damage: str):
    run = replace(Run.read(tiny_run_paths["flowers"]), path=tmp_path / "run")
    run.write()
    card, tensors = tmp_path / "run" / "task.json", tmp_path / "run" / "prompts.safetensors"
    expected: type[BundleError] = BundleCorruptError
    if damage == "card":
        card.write_bytes(card.read_bytes()[:-5])
    elif damage == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    else:
        card.unlink()
        expected = BundleError
    name = "prompts.safetensors" if damage == "tensors" else "task.json"
    with pytest.raises(expected, match=name):
        export_bundle([tmp_path / "run"], tmp_path / "zoo")
    with pytest.raises(expected, match=name):
        export_folded(tmp_path / "run", tmp_path / "x.onnx")
    assert visible(tmp_path) == ["run"]


# --- where it is written ---


def test_a_folder_that_is_no_bundle_is_not_overwritten(traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    with pytest.raises(BundleError, match="thesis: exists and is not a bundle"):
        export_bundle([tiny_run_paths["flowers"]], tmp_path / "thesis")
    with pytest.raises(BundleError, match="thesis: is a folder"):
        export_folded(tiny_run_paths["flowers"], tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter").read_text() == "precious"


def test_folders_on_the_way_are_made(traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path):
    export_folded(tiny_run_paths["flowers"], tmp_path / "a" / "b" / "x.onnx")
    export_bundle([tiny_run_paths["flowers"]], tmp_path / "c" / "d" / "zoo")
    assert visible(tmp_path / "a" / "b") == ["x.onnx"]
    assert visible(tmp_path / "c" / "d") == ["zoo"]


def test_exporting_again_replaces_tasks_and_a_session_follows(
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    zoo_copy: Path,
    trained: dict[str, np.ndarray],
    random_pixels: MakePixels,
):
    with load(zoo_copy, threads=1) as session:
        export_bundle([tiny_run_paths["probe"], tiny_run_paths["flowers"]], zoo_copy, existing="replace")
        report = session.sync()
        assert set(report.updated) == {"probe", "flowers"}
        assert report.removed == ("birds",)
        scale = np.abs(trained["flowers"]).max()
        found = answers(session, "flowers", random_pixels(6))
        np.testing.assert_allclose(found, trained["flowers"], rtol=0, atol=1e-5 * scale)
    assert Bundle.open(zoo_copy).tasks == ("probe", "flowers")
    assert visible(zoo_copy / "tasks") == ["birds", "flowers", "probe"]  # the session held it while it was dropped
    collect_leftovers(zoo_copy)
    assert visible(zoo_copy / "tasks") == ["flowers", "probe"]


class Killed(BaseException):
    """Stands for the end of the process at some step."""


@pytest.mark.parametrize(
    ("step", "existing"),
    [
        *itertools.product(["pack", "save_model", "run_gate", "with_details"], [True, False]),
        ("replace_bundle", True),
        ("write_bundle", False),
    ],
)
def test_a_kill_at_any_step_leaves_the_old_bundle_or_nothing(
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    zoo_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    existing: bool,
):
    def die(*_: object, **__: object) -> None:
        raise Killed

    out = zoo_copy if existing else tmp_path / "new"
    before = toy.snapshot(zoo_copy)
    monkeypatch.setattr(export if step in ("save_model", "run_gate") else switchable, step, die)
    with pytest.raises(Killed):
        export_bundle([tiny_run_paths["birds"]], out, existing="replace" if existing else "refuse")
    assert toy.snapshot(zoo_copy) == before
    assert visible(tmp_path) == ["zoo"]


@pytest.mark.parametrize("step", ["_with_version", "_replace_manifest", "sha256_of_file"])
def test_a_kill_while_the_bundle_is_replaced_leaves_it_loadable(
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    zoo_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(bundle_module, step, die)
        with pytest.raises(Killed):
            export_bundle([tiny_run_paths["birds"]], zoo_copy, existing="replace")
    with load(zoo_copy, threads=1) as session:
        assert session.tasks == TASKS
    assert export_bundle([tiny_run_paths["birds"]], zoo_copy, existing="replace").parity[0].passed
    with load(zoo_copy, threads=1) as session:
        assert session.tasks == ("birds",)


@pytest.mark.parametrize("step", ["save_model", "append_metadata"])
def test_a_kill_while_a_folded_model_is_written_leaves_the_old_file(
    traced: Traced,
    tiny_run_paths: dict[str, Path],
    folded_flowers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
):
    out = Path(shutil.copy(folded_flowers, tmp_path / "flowers.onnx"))
    module = export if step == "save_model" else folded
    real = getattr(module, step)

    def write_then_die(*arguments: Any) -> None:
        real(*arguments)
        raise Killed

    monkeypatch.setattr(module, step, write_then_die)
    with pytest.raises(Killed):
        export_folded(tiny_run_paths["flowers"], out)
    assert out.read_bytes() == folded_flowers.read_bytes()
    assert visible(tmp_path) == ["flowers.onnx"]


def test_the_weights_of_a_folded_model_are_written_once_and_its_card_after_them(
    traced: Traced, tiny_run_paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gated: list[tuple[int, bytes]] = []
    real = export.run_gate

    def note(artifact: Artifact, *arguments: Any) -> Any:
        gated.append((artifact.graph_path.stat().st_ino, artifact.graph_path.read_bytes()))
        return real(artifact, *arguments)

    monkeypatch.setattr(export, "run_gate", note)
    out = export_folded(tiny_run_paths["flowers"], tmp_path / "flowers.onnx").path
    ((file, written),) = gated
    found = out.read_bytes()
    assert found.startswith(written)
    # The file that the gate ran is the one that is published, with a card of some kB behind its weights.
    assert out.stat().st_ino == file
    assert 0 < len(found) - len(written) < len(written) / 10


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_the_old_bundle_and_no_visible_rest(
    tiny_run_paths: dict[str, Path], zoo_copy: Path, tmp_path: Path
):
    program = """
import os, signal, sys
from pathlib import Path
import exports, onnx_ir, tiny_runs
from vpdeploy.format import bundle
from vpdeploy_export.forms import switchable

graph = Path(sys.argv[1]) / "model.onnx"
switchable.build_switchable = lambda *_, **__: onnx_ir.load(graph)
bundle._replace_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
exports.export_bundle([Path(sys.argv[2])], Path(sys.argv[3]), existing="replace")
"""
    before = (zoo_copy / "manifest.json").read_bytes()
    tests = str(Path(__file__).parents[1])
    finished = subprocess.run(
        [sys.executable, "-c", program, str(zoo_copy), str(tiny_run_paths["birds"]), str(zoo_copy)],
        env={**os.environ, "PYTHONPATH": tests},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    assert (zoo_copy / "manifest.json").read_bytes() == before
    assert visible(tmp_path) == ["zoo"]
    with load(zoo_copy, threads=1) as session:
        assert session.tasks == TASKS


# --- adding a task ---


def test_a_run_is_added_as_a_task_and_as_a_new_version(
    command: Command,
    tiny_weights: Path,
    zoo_copy: Path,
    tmp_path: Path,
    random_pixels: MakePixels,
):
    kept = tiny_runs.ragged_kept([[0], [1, 2], []], [[0], [], [5]])
    run = tiny_runs.write_run(tmp_path / "fish", tiny_weights, name="fish", classes=9, kept=kept, seed=50)
    graph = (zoo_copy / "model.onnx").read_bytes()
    for version in (1, 2):
        code, out, err = command("task", "add", zoo_copy, tmp_path / "fish")
        assert (code, err) == (0, "")
        assert f"task 'fish' at version {version}" in out
    assert (zoo_copy / "model.onnx").read_bytes() == graph
    expected = expected_logits(run.load_model(run.load_backbone()), random_pixels(6), run.card.preprocessing)
    with load(zoo_copy, threads=1) as session:
        found = answers(session, "fish", random_pixels(6))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "parity" in Bundle.open(zoo_copy).read_task("fish").card.details


def test_a_run_is_added_to_a_bundle_of_format_version_1_which_becomes_one_of_version_3(
    command: Command, tiny_run_paths: dict[str, Path], zoo_copy: Path
):
    manifest = json.loads((zoo_copy / "manifest.json").read_text())
    del manifest["graph"]["image_input"]
    (zoo_copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    code, _, err = command("task", "add", zoo_copy, tiny_run_paths["flowers"])
    assert code == 0, err
    written = json.loads((zoo_copy / "manifest.json").read_text())
    assert (written["format_version"], written["graph"]["image_input"]) == (3, "uint8")
    assert written["tasks"]["flowers"]["version"] == 2


def test_a_run_is_compiled_in_the_bundles_own_precision(
    tiny_run_paths: dict[str, Path], half_zoo: ExportReport, tmp_path: Path
):
    import shutil

    path = Path(shutil.copytree(half_zoo.path, tmp_path / "zoo"))
    version, report = add_to_bundle(path, tiny_run_paths["flowers"])
    assert version == 2
    assert report.allowed_difference >= TOLERANCES["fp16"].exported
    assert Bundle.open(path).read_task("flowers").tensors["prefix_key"].dtype == np.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 7}, "belongs to backbone"),
        (
            {"preprocessing": replace(tiny_runs.PREPROCESSING, std=(0.5, 0.5, 0.5))},
            "preprocessed unlike the bundle: std",
        ),
        ({"preprocessing": OTHER_SIZE, "image_size": 64}, "belongs to backbone|preprocessed unlike"),
    ],
    ids=["weights", "normalisation", "image size"],
)
def test_a_run_that_does_not_fit_is_not_added(
    zoo_copy: Path, tiny_weights: Path, tmp_path: Path, change: dict[str, Any], message: str
):
    weights = tiny_weights
    options = {"name": "other", "classes": 3, "kept": None, "method": "linear", **change}
    if seed := options.pop("weights", None):
        weights = tiny_runs.write_weights(tmp_path / "other.safetensors", seed=seed)
    tiny_runs.write_run(tmp_path / "other", weights, **options)
    before = toy.snapshot(zoo_copy)
    with pytest.raises(LayoutMismatchError, match=f"'other' .*({message})"):
        add_to_bundle(zoo_copy, tmp_path / "other")
    assert toy.snapshot(zoo_copy) == before


def test_a_run_is_not_added_to_a_bundle_whose_backbone_has_stages(tiny_run_paths: dict[str, Path], tmp_path: Path):
    stages = (Stage(depth=1, width=3, heads=1), Stage(depth=1, width=toy.WIDTH, heads=toy.HEADS))
    backbone = replace(toy.BACKBONE, hierarchy=stages)
    facts = toy.facts(backbone=backbone, layout=Layout.for_backbone(backbone, dtype="float32"))
    (tmp_path / "staged.onnx").write_bytes(b"not a graph")
    write_bundle(tmp_path / "zoo", facts, [], tmp_path / "staged.onnx")
    with pytest.raises(LayoutMismatchError, match="belongs to backbone"):
        add_to_bundle(tmp_path / "zoo", tiny_run_paths["flowers"])


def test_dimensions_that_are_not_the_backbones_are_refused(tiny_run_paths: dict[str, Path], tmp_path: Path):
    shutil.copytree(tiny_run_paths["flowers"], tmp_path / "run")
    card = tmp_path / "run" / "task.json"
    card.write_text(card.read_text().replace('"heads": 3', '"heads": 1'))
    with pytest.raises(BundleCorruptError, match=r"task\.json: the backbone's dimensions"):
        export_bundle([tmp_path / "run"], tmp_path / "zoo")


# --- the command ---


def test_the_command_reports_in_text_and_json(
    traced: Traced, command: Command, tiny_run_paths: dict[str, Path], tmp_path: Path
):
    code, out, err = command("export", *tiny_run_paths.values(), "--out", tmp_path / "zoo", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert list(report["parity"]) == list(TASKS)
    assert report["size_bytes"] == (tmp_path / "zoo" / "model.onnx").stat().st_size
    code, out, err = command("export", tiny_run_paths["flowers"], "--out", tmp_path / "x.onnx")
    assert (code, err) == (0, "")
    assert "flowers: " in out
    assert "top-1 agreement 100.0% on 32 synthetic images" in out
    assert f"next: vpdeploy predict {tmp_path / 'x.onnx'} IMAGE" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flowers", "birds", "--out", "x.onnx"), "a folded model holds one task, 2 runs given"),
        (("flowers", "--out", "zoo", "--input", "float"), "--input float is for folded models"),
        (("flowers", "--out", "x.onnx", "--input", "jpeg"), "choose one of uint8, float"),
        (("flowers", "--out", "x.onnx", "--opset", "17"), "--opset 17: choose one of 20, 23"),
        (("none", "--out", "x.onnx"), "none: not a finished run, task.json is missing"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_one_line(
    command: Command,
    tiny_run_paths: dict[str, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("export", *(tiny_run_paths.get(each, each) for each in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []
