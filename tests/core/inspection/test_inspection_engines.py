from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from core import toy

from vpdeploy.bench.benchmark import Choice, open_subject
from vpdeploy.engines.plan import EngineCard
from vpdeploy.engines.profile import AxisRange, Profile
from vpdeploy.errors import BundleCorruptError, BundleError, EngineIncompatibleError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.interface import Binding
from vpdeploy.inspection import engines
from vpdeploy.inspection.engines import artifact_of_engine, describe_engines, read_engine_card
from vpdeploy.inspection.report import inspect_path
from vpdeploy.machine import Gpu

L4 = Gpu(name="NVIDIA L4", sm="sm_89", memory_bytes=24 << 30, cuda_version="13.0")
CONTENT = b"an engine"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact.open(toy.write(tmp_path / "zoo").path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """An L4 with TensorRT-RTX 1.7.1 installed."""
    monkeypatch.setattr(engines, "find_gpu", lambda: L4)
    monkeypatch.setattr(engines, "is_installed", lambda name: True)
    monkeypatch.setattr(engines, "load_toolkit", lambda name: SimpleNamespace(version="1.7.1"))
    return L4


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_gpu", lambda: None)
    monkeypatch.setattr(engines, "gpu_obstacle", lambda: "no NVIDIA driver")
    monkeypatch.setattr(engines, "is_installed", lambda name: True)


def write_engine(artifact: Artifact, **changes: object) -> Path:
    card = EngineCard(
        runtime="tensorrt-rtx",
        runtime_version="1.7.1",
        targets=("sm_86", "sm_89"),
        gpu_name=None,
        platform=None,
        precision="fp32",
        profile=Profile().add("batch", AxisRange(1, 8, 32)),
        graph_sha256=artifact.sha256,
        layout_digest=None,
        inputs={"image": Binding(dtype="uint8", shape=("batch", 8, 8, 3))},
        outputs={"logits": Binding(dtype="float32", shape=("batch", 4))},
        size_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        build_seconds=0.5,
    )
    card = replace(card, **changes)  # type: ignore[arg-type]
    artifact.engines_folder.mkdir(exist_ok=True)
    path = artifact.engines_folder / f"{card.key}.engine"
    path.write_bytes(CONTENT)
    path.with_suffix(".json").write_text(json.dumps(card.to_fields()))
    return path


def test_a_graph_without_engines_has_none(artifact: Artifact):
    assert describe_engines(artifact) == ()


def test_an_engine_for_this_gpu_fits(artifact: Artifact, gpu: Gpu):
    path = write_engine(artifact)
    (found,) = describe_engines(artifact)
    fields = found.to_json()
    assert (fields["file"], fields["fits"], fields["reason"]) == (path.name, True, None)
    assert (fields["runtime"], fields["targets"], fields["precision"]) == ("tensorrt-rtx", ["sm_86", "sm_89"], "fp32")
    assert (fields["profile"], fields["size_bytes"]) == ({"batch": "1:8:32"}, len(CONTENT))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ("sm_86",)}, "here is NVIDIA L4 (sm_89)"),
        ({"runtime_version": "1.6.0"}, "it needs tensorrt-rtx 1.6.0, here is 1.7.1"),
    ],
)
def test_an_engine_for_something_else_says_why_not(
    artifact: Artifact, gpu: Gpu, changes: dict[str, object], reason: str
):
    write_engine(artifact, **changes)
    (found,) = describe_engines(artifact)
    assert reason in str(found.misfit)
    assert (found.to_json()["fits"], found.to_json()["reason"]) == (False, found.misfit)


def test_without_a_gpu_the_obstacle_is_the_reason(artifact: Artifact, no_gpu: None):
    write_engine(artifact)
    assert [each.misfit for each in describe_engines(artifact)] == ["no NVIDIA driver"]


def test_without_the_runtime_its_extra_is_the_reason(artifact: Artifact, gpu: Gpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "is_installed", lambda name: False)
    write_engine(artifact)
    assert "pip install 'vpdeploy[rtx]'" in str(describe_engines(artifact)[0].misfit)


def test_damaged_engines_are_listed_and_those_of_other_graphs_are_not(artifact: Artifact, gpu: Gpu):
    write_engine(artifact, graph_sha256="00" * 32)
    assert describe_engines(artifact) == ()
    write_engine(artifact).with_suffix(".json").unlink()
    (found,) = describe_engines(artifact)
    assert "its sidecar" in str(found.misfit)
    assert found.to_json() == {"file": found.file, "fits": False, "reason": found.misfit}


def test_an_engine_file_is_explained(artifact: Artifact, gpu: Gpu):
    path = write_engine(artifact)
    report = inspect_path(path).to_json()
    assert (report["kind"], report["fits"], report["build_seconds"]) == ("engine", True, 0.5)
    assert report["inputs"] == {"image": "uint8 ['batch', 8, 8, 3]"}
    assert report["graph_sha256"] == artifact.sha256


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"an"), "should have 9 bytes, found 2; build it again"),
        (lambda path: path.with_suffix(".json").unlink(), r"its sidecar .*\.json is missing.* run vpdeploy build"),
        (lambda path: path.with_suffix(".json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_damaged_engine_is_refused(artifact: Artifact, damage: object, message: str):
    path = write_engine(artifact)
    damage(path)  # type: ignore[operator]
    with pytest.raises(BundleCorruptError, match=message):
        read_engine_card(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(CONTENT[:-1], "truncated, 8 of 9 bytes are there"), (CONTENT[::-1], "do not match its sidecar's sha256")],
)
def test_a_tampered_engine_is_named_beside_everything_else(artifact: Artifact, gpu: Gpu, content: bytes, message: str):
    path = write_engine(artifact)
    path.write_bytes(content)
    bundle = inspect_path(artifact.path)
    assert len(bundle.damage) == 1
    assert message in bundle.damage[0]
    assert path.name in bundle.damage[0]
    assert "run vpdeploy build again" in bundle.damage[0]
    report = bundle.to_json()
    assert [task["name"] for task in report["tasks"]] == list(artifact.tasks)
    assert (report["engines"][0]["fits"], report["engines"][0]["targets"]) == (False, ["sm_86", "sm_89"])
    alone = inspect_path(path)
    assert alone.damage == bundle.damage
    assert alone.to_json()["graph_sha256"] == artifact.sha256


def test_an_engine_in_the_place_of_a_model_names_what_to_give(artifact: Artifact, tmp_path: Path):
    path = write_engine(artifact)
    with pytest.raises(BundleError, match=f"is an engine; give its bundle, {re.escape(str(artifact.path))}"):
        Artifact.open(path)
    (tmp_path / "alone.engine").write_bytes(CONTENT)
    with pytest.raises(BundleError, match=r"is an engine; give the bundle's folder, or the \.onnx file"):
        Artifact.open(tmp_path / "alone.engine")


def test_a_missing_engine_is_refused(artifact: Artifact):
    with pytest.raises(BundleError, match="does not exist; vpdeploy build writes engines"):
        read_engine_card(artifact.engines_folder / "x.engine")


def test_the_graph_of_an_engine_is_the_bundle_around_it(artifact: Artifact):
    path = write_engine(artifact)
    assert artifact_of_engine(path, read_engine_card(path)).path == artifact.path


def test_the_graph_of_an_engine_is_the_file_with_its_hash(folded_flowers: Path, tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(b"another")
    copied = tmp_path / "flowers.onnx"
    copied.write_bytes(folded_flowers.read_bytes())
    path = write_engine(Artifact.open(copied))
    assert artifact_of_engine(path, read_engine_card(path)).path == copied
    copied.unlink()
    with pytest.raises(EngineIncompatibleError, match="is the graph it was built from; put it back or build again"):
        artifact_of_engine(path, read_engine_card(path))


def test_an_engine_of_a_replaced_graph_names_the_command(artifact: Artifact):
    path = write_engine(artifact, graph_sha256="00" * 32)
    with pytest.raises(EngineIncompatibleError, match=r"was built from another graph .* run: vpdeploy build"):
        artifact_of_engine(path, read_engine_card(path))


def test_an_engine_that_does_not_fit_is_not_measured(artifact: Artifact, no_gpu: None):
    choice = Choice(path=write_engine(artifact))
    with pytest.raises(EngineIncompatibleError, match="does not fit this machine: no NVIDIA driver"):
        open_subject(choice, name="x", threads=None, tasks=None)


def test_an_engine_is_not_run_by_another_runtime(artifact: Artifact, gpu: Gpu):
    choice = Choice(path=write_engine(artifact), runtime="onnxruntime-cpu")
    with pytest.raises(SpecError, match="was built for runtime 'tensorrt-rtx', not 'onnxruntime-cpu'"):
        open_subject(choice, name="x", threads=None, tasks=None)
