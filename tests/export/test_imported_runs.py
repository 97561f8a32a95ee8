"""Exports of imported checkpoints give the logits that the public code's modules gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exports import export_bundle, export_folded
from parity_files import CASES, difference, import_case, read_expected
from typer.testing import CliRunner

import vpdeploy
from vpdeploy.cli.main import build_app
from vpdeploy.errors import SpecError
from vpdeploy_export.export import ExportReport

TOLERANCE = 1e-4

Import = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Import:
    """The run folder of a case, imported once."""
    folder = tmp_path_factory.mktemp("imported")
    paths: dict[tuple[str, str], Path] = {}

    def path_of(name: str, case: str) -> Path:
        if (name, case) not in paths:
            paths[name, case] = import_case(name, case, folder).path
        return paths[name, case]

    return path_of


def assert_expected(report: ExportReport, name: str, case: str) -> None:
    expected = read_expected(name)
    with vpdeploy.load(report.path, runtime="onnxruntime-cpu") as session, session.lease(f"{name}-{case}") as lease:
        slots = np.full(len(expected["images"]), lease.slot, dtype=np.int32)
        logits = session.run(expected["images"], slots)
    reference = expected[f"{case}.logits"]
    assert difference(logits[:, : reference.shape[1]], reference) < TOLERANCE


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_folded_graph_reproduces_the_reference(tmp_path: Path, imported: Import, name: str, case: str):
    report = export_folded(imported(name, case), tmp_path / "task.onnx")
    assert_expected(report, name, case)
    assert report.parity[0].source == "32 synthetic images (the run was imported and has no data of its own)"


@pytest.mark.parametrize("names", [("vpt_deep_toy",), ("e2vpt_toy",), ("vapt_toy",)], ids=lambda names: names[0])
def test_the_bundle_reproduces_the_reference(tmp_path: Path, imported: Import, names: tuple[str]):
    """Both cases of E²VPT's file share a bundle: the same backbone was frozen."""
    runs = [(name, case) for name, case in CASES if name in names]
    report = export_bundle([imported(*run) for run in runs], tmp_path / "zoo")
    for name, case in runs:
        assert_expected(report, name, case)


def test_a_bundle_refuses_shallow_prompts_in_one_sentence(tmp_path: Path, imported: Import):
    with pytest.raises(SpecError, match=r"VPT-shallow's prompts .* are tokens of the graph.* export it alone as FILE"):
        export_bundle([imported("vpt_shallow_toy", "plain")], tmp_path / "zoo")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_different_backbones_do_not_share_a_bundle(tmp_path: Path, imported: Import):
    runs = [imported("e2vpt_toy", "pruned"), imported("vapt_toy", "plain")]
    with pytest.raises(
        SpecError, match=r"have different backbones: plain_vit_patch16_64_.* and plain_vit_patch16_224_"
    ):
        export_bundle(runs, tmp_path / "zoo")
    runs = [imported("e2vpt_toy", "pruned"), imported("vpt_deep_toy", "plain")]
    with pytest.raises(SpecError, match="have different weights of plain_vit_patch16_64_"):
        export_bundle(runs, tmp_path / "zoo")


def test_inspect_explains_an_imported_run(imported: Import):
    result = CliRunner().invoke(build_app(), ["inspect", str(imported("e2vpt_toy", "pruned")), "--json"])
    report = json.loads(result.stdout)
    assert report["imported"]["file"] == "e2vpt_toy.pth"
    assert set(report["files_bytes"]) == {"task.json", "prompts.safetensors", "backbone.safetensors"}
