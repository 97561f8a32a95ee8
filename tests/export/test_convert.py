"""``vpdeploy convert``: what holds for every target."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from core import toy
from exports import export_bundle
from PIL import Image

from vpdeploy.cli.main import main
from vpdeploy.errors import BundleCorruptError, BundleError, BundleVersionError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, withdraw_task
from vpdeploy.format.datafile import data_file_of
from vpdeploy.session.session import Session
from vpdeploy_export import conversion
from vpdeploy_export.conversion import convert as convert_bundle
from vpdeploy_export.images import GateImages
from vpdeploy_export.onnx import save
from vpdeploy_export.parity import Expectation, compare
from vpdeploy_export.passes import TableConstantsPass
from vpdeploy_export.targets import TARGETS, triton
from vpdeploy_export.targets.target import Conversion, TargetOptions

ANYWHERE = ["onnx-adapter", "triton"]
"""Targets that need no GPU."""


def convert(zoo: Path, out: Path, target: str, **options: Any) -> Path:
    """Convert and return the folder that was written."""
    images = options.pop("images", None)
    return convert_bundle(zoo, out, target=target, options=TargetOptions(**options), images=images).path


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vpdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        return int(raised.value.code or 0), out, err

    return run


def test_a_graph_without_an_input_of_the_layout_is_refused(zoo: Path, tmp_path: Path):
    conversion = Conversion(
        artifact=Artifact.open(zoo),
        prompt_sets=(),
        options=TargetOptions(),
        scratch=tmp_path,
    )
    with pytest.raises(BundleCorruptError, match=r"model.onnx: the graph has no input 'prompts'; export again"):
        conversion.graph(TableConstantsPass({"prompts": np.zeros((1, 2), np.float32)}, 2))


# --- what is written ---


@pytest.mark.parametrize("target", ANYWHERE)
def test_the_card_names_every_file_with_its_digest_and_every_task_with_its_parity(
    zoo: Path, tmp_path: Path, target: str
):
    folder = convert(zoo, tmp_path / "out", target)
    card = json.loads((folder / "tasks.json").read_text())
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    assert card["target"] == target
    assert card["files"].keys() == files.keys() - {"tasks.json"}
    for name, digest in card["files"].items():
        assert digest == hashlib.sha256(files[name].read_bytes()).hexdigest()
    manifest = Bundle.open(zoo).manifest
    assert card["graph"]["converted_from_sha256"] == manifest.graph_sha256
    assert card["preprocessing"] == manifest.preprocessing.to_fields()
    assert list(card["tasks"]) == ["flowers", "birds", "probe"]
    for task, facts in card["tasks"].items():
        assert (folder / facts["label_file"]).read_text().splitlines() == facts["labels"]
        assert facts["labels"] == list(Bundle.open(zoo).read_task(task).card.labels)
        assert facts["parity"]["images"] == 8
        assert facts["parity"]["max_abs_difference"] <= facts["parity"]["allowed_difference"]


def test_a_label_of_several_lines_is_one_line_of_the_label_file(tmp_path: Path):
    from vpdeploy_export.targets.labels import write_labels

    assert write_labels(tmp_path, "x", ["a\nb", "c", " d  é"]) == "labels/x.txt"
    assert (tmp_path / "labels" / "x.txt").read_text(encoding="utf-8") == "a b\nc\nd é\n"


@pytest.mark.parametrize("target", ANYWHERE)
def test_the_bundle_is_only_read(zoo_copy: Path, tmp_path: Path, target: str):
    before = toy.snapshot(zoo_copy)
    convert(zoo_copy, tmp_path / "out", target)
    assert toy.snapshot(zoo_copy) == before


@pytest.mark.parametrize("target", ANYWHERE)
def test_a_graph_of_two_files_is_converted_to_two_files(
    zoo: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 10_000)
    folder = convert(zoo, tmp_path / "out", target)
    (graph,) = folder.rglob("model.onnx")
    data = data_file_of(graph)
    assert data is not None
    data.verify(graph.parent)
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("target", ANYWHERE)
def test_a_bfloat16_bundle_is_compared_in_float32_and_stays_bfloat16(
    tiny_run_paths: dict[str, Path], tmp_path: Path, target: str
):
    zoo = export_bundle([tiny_run_paths["flowers"], tiny_run_paths["probe"]], tmp_path / "zoo", precision="bf16").path
    folder = convert(zoo, tmp_path / "out", target)
    (graph,) = folder.rglob("model.onnx")
    kinds = {tensor.data_type for tensor in onnx.load(graph).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert json.loads((folder / "tasks.json").read_text())["graph"]["precision"] == "bf16"


# --- the verb ---


def test_the_verb_reports_each_task_and_what_to_do_next(zoo: Path, tmp_path: Path, run_cli):
    code, out, err = run_cli("convert", zoo, "--to", "onnx-adapter", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: onnx-adapter, ")
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["flowers", "birds", "probe"]
    assert all("8 of 32 synthetic images" in line for line in lines[1:4])
    assert lines[4] == f"next: {tmp_path / 'out'}/README.txt"


def test_the_report_as_json(zoo: Path, tmp_path: Path, run_cli):
    code, out, _ = run_cli("convert", zoo, "--to", "triton", "--out", tmp_path / "repository", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["path"] == str(tmp_path / "repository" / "zoo")
    assert report["size_bytes"] == sum(file.stat().st_size for file in (tmp_path / "repository").rglob("*.*"))
    assert report["parity"].keys() == {"flowers", "birds", "probe"}


def test_images_of_a_folder_are_compared(zoo: Path, tmp_path: Path, random_pixels: Callable[..., np.ndarray]):
    (tmp_path / "pictures").mkdir()
    for index, pixels in enumerate(random_pixels(3)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    folder = convert(zoo, tmp_path / "out", "onnx-adapter", images=tmp_path / "pictures")
    parity = json.loads((folder / "tasks.json").read_text())["tasks"]["birds"]["parity"]
    assert (parity["images"], parity["source"]) == (3, "3 of 3 images of pictures")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tflite", {}, "--to 'tflite': choose one of onnx-adapter, triton, ep-context"),
        ("onnx-adapter", {"max_batch": 4}, "--max-batch means nothing to onnx-adapter; it takes none of its kind"),
        (
            "ep-context",
            {"queue_delay_ms": 1.0},
            "--queue-delay-ms means nothing to ep-context; it takes --max-batch, --provider",
        ),
        ("triton", {"provider": "X"}, "--provider means nothing to triton; it takes --device, --max-batch, --name"),
        ("triton", {"device": "tpu"}, "--device 'tpu': choose one of auto, cpu, gpu"),
        ("triton", {"max_batch": 0}, "--max-batch 0: should be at least 1"),
        ("triton", {"queue_delay_ms": -1.0}, "--queue-delay-ms -1: should be from 0 to 60000"),
        ("triton", {"name": "../up"}, "'../up' cannot name a model"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    zoo: Path, tmp_path: Path, target: str, options: dict[str, Any], message: str
):
    with pytest.raises(SpecError, match=message):
        convert(zoo, tmp_path / "out", target, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_refused(folded_flowers: Path, zoo_copy: Path, tmp_path: Path):
    with pytest.raises(BundleError, match="a folded model runs in any ONNX runtime as it is"):
        convert(folded_flowers, tmp_path / "out", "triton")
    with pytest.raises(BundleError, match="not a bundle"):
        convert(tmp_path, tmp_path / "out", "triton")
    for task in Bundle.open(zoo_copy).tasks:
        withdraw_task(zoo_copy, task)
    with pytest.raises(SpecError, match="holds no task; add one with vpdeploy task add"):
        convert(zoo_copy, tmp_path / "out", "triton")
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_is_refused(zoo_copy: Path, tmp_path: Path):
    os.truncate(zoo_copy / "model.onnx", 1000)
    with pytest.raises(BundleCorruptError, match=r"model\.onnx: contents do not match"):
        convert(zoo_copy, tmp_path / "out", "onnx-adapter")
    assert not (tmp_path / "out").exists()


# --- where it is written ---


@pytest.mark.parametrize("target", ANYWHERE)
def test_a_conversion_is_replaced_by_the_next_one(zoo_copy: Path, tmp_path: Path, target: str):
    folder = convert(zoo_copy, tmp_path / "out", target)
    withdraw_task(zoo_copy, "birds")
    assert convert(zoo_copy, tmp_path / "out", target) == folder
    assert list(json.loads((folder / "tasks.json").read_text())["tasks"]) == ["flowers", "probe"]
    assert not (folder / "labels" / "birds.txt").exists()
    assert not list(folder.parent.glob(".*"))


def test_only_what_a_conversion_wrote_is_replaced(
    zoo: Path, zoo_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter").write_text("precious")
    with pytest.raises(BundleError, match="thesis: exists and was not written by vpdeploy convert"):
        convert(zoo, thesis, "onnx-adapter")
    with pytest.raises(BundleError, match="chapter: is a file, expected the name of a folder"):
        convert(zoo, thesis / "chapter", "onnx-adapter")
    with pytest.raises(BundleError, match="exists and was not written by vpdeploy convert"):
        convert(zoo, zoo_copy, "onnx-adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BundleError, match="holds the current folder, which cannot be replaced"):
        convert(zoo, Path(), "onnx-adapter")
    folder = convert(zoo, tmp_path / "repository", "triton")
    with pytest.raises(BundleError, match="holds a conversion to triton, not to onnx-adapter"):
        convert(zoo, folder, "onnx-adapter")
    (folder / "2").mkdir()
    card = (folder / "tasks.json").read_text()
    (folder / "tasks.json").write_text(json.dumps({"format": "vpdeploy.conversion", "format_version": 9}))
    with pytest.raises(BundleVersionError, match="format version 9 is not readable"):
        convert(zoo, tmp_path / "repository", "triton")
    (folder / "tasks.json").write_text(card)
    (folder / "2" / "model.onnx").write_text("the user's second version")
    with pytest.raises(BundleError, match=r"holds 2/model\.onnx, which vpdeploy convert did not write"):
        convert(zoo, tmp_path / "repository", "triton")
    (folder / "tasks.json").write_text("{")
    with pytest.raises(BundleCorruptError, match=r"tasks\.json: not valid JSON"):
        convert(zoo, tmp_path / "repository", "triton")
    assert (thesis / "chapter").read_text() == "precious"
    assert (folder / "2" / "model.onnx").exists()


def test_a_link_to_the_folder_stays_one(zoo: Path, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        convert(zoo, tmp_path / "link", "onnx-adapter")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "tasks.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", ["save_model", "write_labels", "compare"])
def test_a_failure_at_any_step_leaves_the_old_conversion_or_nothing(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, step: str
):
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    if existing:
        convert(zoo, tmp_path / "repository", "triton")
    before = toy.snapshot(tmp_path)
    monkeypatch.setattr(conversion if step == "compare" else triton, step, die)
    with pytest.raises(Killed):
        convert(zoo, tmp_path / "repository", "triton", max_batch=3)
    assert toy.snapshot(tmp_path) == before


def test_a_full_disk_is_one_line(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton, "save_model", fail)
    code, out, err = run_cli("convert", zoo, "--to", "triton", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path / 'out' / 'zoo'}: cannot be written, the disk is full; it is as it was before\n"


# --- the gate ---


@pytest.mark.parametrize("target", ANYWHERE)
def test_a_conversion_that_answers_otherwise_is_not_published(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli, target: str
):
    real = conversion.Conversion.graph

    def shifted(given: conversion.Conversion, *passes: Any) -> Any:
        model = real(given, *passes)
        for name, value in model.graph.initializers.items():
            array = value.const_value.numpy()
            if array.dtype == np.float32 and array.ndim == 1:
                value.const_value = ir.Tensor(array + np.float32(0.05), name=name)
        return model

    monkeypatch.setattr(conversion.Conversion, "graph", shifted)
    code, out, err = run_cli("convert", zoo, "--to", target, "--out", tmp_path / "out")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: task 'flowers': the model converted to {target} differs from the bundle by up to ")
    assert "nothing was written" in err
    assert not list(tmp_path.rglob("*.onnx"))


def test_the_tolerance_is_a_share_of_the_largest_logit_and_nan_never_passes(zoo: Path):
    from vpdeploy import load

    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with load(zoo, threads=1) as session:
        expectations = Expectation.of_session(session, GateImages(pixels=pixels, source="three images"))
        assert [each.task for each in expectations] == list(session.tasks)
        largest = [max(1.0, float(np.abs(each.logits).max())) for each in expectations]
        for mixed in (True, False):
            found = compare(Converted(session, mixed=mixed), expectations, tolerance=1e-4)
            assert [(each.task, each.images) for each in found] == [(task, 3) for task in session.tasks]
            assert all(each.max_abs_difference < 1e-5 * scale for each, scale in zip(found, largest, strict=True))
            assert [each.allowed_difference for each in found] == pytest.approx([1e-4 * scale for scale in largest])
        broken = compare(Converted(session, mixed=True, factor=np.nan), expectations, tolerance=1e-4)
        assert not any(each.passed for each in broken)


class Converted:
    """A bundle's answers, as if they came from a converted model."""

    runtime = "test"

    def __init__(self, session: Session, *, mixed: bool, factor: float = 1.0) -> None:
        self.session, self.mixes_tasks, self.factor = session, mixed, np.float32(factor)

    def answer(self, pixels: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
        assert self.mixes_tasks or len(set(tasks)) == 1
        slots = np.array([self.session.tasks.index(task) for task in tasks], np.int32)
        return self.session.run(pixels, slots) * self.factor


def test_every_target_is_in_the_help(run_cli):
    code, out, _ = run_cli("convert", "--help")
    assert code == 0
    assert all(target in out for target in TARGETS)
