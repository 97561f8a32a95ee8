"""Formats over time: artifacts of version 1 are read and written anew, ones of the future are refused as such.

``tests/golden/version1`` was written by the code of format version 1 and is never changed: a bundle of the toy tasks
``rgb`` and ``warm`` of ``server.toy_bundle``, and the task ``rgb`` folded with either form of the image input.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core import toy
from core.engines.conftest import card_of

from vpdeploy import load
from vpdeploy.backends import providers
from vpdeploy.engines.plan import EngineCard
from vpdeploy.errors import BundleCorruptError, BundleVersionError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, publish_task, roll_back_task, withdraw_task
from vpdeploy.format.document import Document
from vpdeploy.format.folded import METADATA_KEY, FoldedCard
from vpdeploy.format.graphfacts import GraphFacts
from vpdeploy.format.manifest import Manifest
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.run import FORMAT as RUN_FORMAT
from vpdeploy.inspection.report import inspect_path

GOLDEN = Path(__file__).parents[2] / "golden" / "version1"
SIDE = 16
RED = np.full((1, SIDE, SIDE, 3), (255, 0, 0), np.uint8)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "zoo", tmp_path / "zoo"))


def version_of(zoo: Path) -> int:
    return int(json.loads((zoo / "manifest.json").read_text())["format_version"])


# --- version 1 ---


def test_a_bundle_of_version_1_answers(zoo: Path):
    artifact = Artifact.open(zoo)
    assert (artifact.image_input, artifact.tasks) == ("uint8", ("rgb", "warm"))
    with load(zoo, threads=1) as session:
        assert session.predict(RED[0], "rgb")[0].label == "red"
        with session.lease("rgb") as lease:
            found = session.run(RED, np.array([lease.slot], np.int32))
    np.testing.assert_allclose(found, [[10, 0, 0]], atol=1e-4)
    assert version_of(zoo) == 1  # reading changes nothing


@pytest.mark.parametrize(("name", "image_input"), [("bytes", "uint8"), ("floats", "float")])
def test_a_folded_model_of_version_1_answers_whatever_its_images_are(name: str, image_input: str):
    artifact = Artifact.open(GOLDEN / f"{name}.onnx")
    assert (artifact.image_input, artifact.precision, artifact.opset) == (image_input, "fp32", 20)
    with load(GOLDEN / f"{name}.onnx", threads=1) as session:
        found = session.run(RED, np.zeros(1, np.int32))
    # The head reads the mean colour: of bytes it is 10 * u / 255, of normalised pixels 10 * (u / 255 - 0.5) / 0.5.
    np.testing.assert_allclose(found, [[10, 0, 0] if image_input == "uint8" else [10, -10, -10]], atol=1e-4)


def test_artifacts_of_version_1_are_reported(zoo: Path):
    assert [task.name for task in inspect_path(zoo).tasks] == ["rgb", "warm"]
    assert inspect_path(GOLDEN / "floats.onnx").input == "image float32 [B, 3, H, W], normalised"
    assert inspect_path(GOLDEN / "bytes.onnx").input == "image uint8 [B, H, W, 3]"
    assert inspect_path(GOLDEN / "bytes.onnx").graph.recorded["elements"] == "not recorded"


def renamed(zoo: Path, name: str) -> CompiledPromptSet:
    """The task ``rgb`` under another name."""
    folder = zoo / "tasks" / "rgb" / "1"
    fields = json.loads((folder / "task.json").read_text())
    fields["task"]["name"] = name
    files = {
        "task.json": json.dumps(fields).encode(),
        "prompts.safetensors": (folder / "prompts.safetensors").read_bytes(),
    }
    return CompiledPromptSet.decode(files, folder=folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda zoo: publish_task(zoo, renamed(zoo, "new")),
        lambda zoo: publish_task(zoo, renamed(zoo, "rgb")),
        lambda zoo: withdraw_task(zoo, "warm"),
        lambda zoo: (publish_task(zoo, renamed(zoo, "rgb")), roll_back_task(zoo, "rgb")),
    ],
    ids=["add", "update", "withdraw", "roll back"],
)
def test_a_bundle_of_version_1_is_of_version_3_once_it_is_written(zoo: Path, change: Callable[[Path], object]):
    graph = (zoo / "model.onnx").read_bytes()
    change(zoo)
    manifest = json.loads((zoo / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["graph"]["image_input"]) == (3, "uint8")
    assert manifest["withdrawn"] == {name: 1 for name in ("rgb", "warm") if name not in manifest["tasks"]}
    assert (zoo / "model.onnx").read_bytes() == graph
    with load(zoo, threads=1) as session:
        assert set(session.tasks) == set(manifest["tasks"])
        assert session.predict(RED[0], "rgb")[0].label == "red"


def test_a_session_follows_a_bundle_of_version_1_that_becomes_one_of_version_3(zoo: Path):
    with load(zoo, threads=1) as session:
        publish_task(zoo, renamed(zoo, "new"))
        assert session.sync().added == ("new",)
        assert session.predict(RED[0], "new")[0].label == "red"


def test_a_folded_model_of_version_1_that_takes_no_known_images_is_refused(tmp_path: Path):
    card = FoldedCard(task=toy.prompt_set().card, graph=GraphFacts(precision="fp32", opset=20, image_input="uint8"))
    fields = json.loads(card.to_metadata()[METADATA_KEY])
    path = write_metadata(tmp_path / "x.onnx", {**fields, "format_version": 1, "precision": "fp32", "opset": 20})
    with pytest.raises(BundleCorruptError, match=r"expected an input 'image' of uint8 or float32, found nothing"):
        Artifact.open(path)


# --- the image input, recorded ---


def test_a_graph_that_takes_other_images_than_are_recorded_is_refused_before_any_request(zoo: Path):
    manifest = json.loads((zoo / "manifest.json").read_text())
    manifest["format_version"] = 2
    manifest["graph"]["image_input"] = "float"
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleCorruptError, match=r"model\.onnx: takes images of uint8, recorded is 'float'; export again"
    ):
        load(zoo, threads=1)


@pytest.mark.parametrize(
    ("options_of", "prefix"), [(providers.tensorrt_options, "trt"), (providers.rtx_options, "nv")], ids=["trt", "nv"]
)
@pytest.mark.parametrize(("name", "shape"), [("bytes", "16x16x3"), ("floats", "3x16x16")])
def test_the_profiles_of_onnx_runtimes_providers_have_the_form_of_the_models_images(
    tmp_path: Path, options_of: Callable[[Artifact], dict[str, str]], prefix: str, name: str, shape: str
):
    path = Path(shutil.copy(GOLDEN / f"{name}.onnx", tmp_path))
    options = options_of(Artifact.open(path))
    found = [options[f"{prefix}_profile_{bound}_shapes"] for bound in ("min", "opt", "max")]
    assert found == [f"image:{batch}x{shape}" for batch in (1, 8, 32)]


# --- versions to come ---


def write_metadata(path: Path, fields: dict[str, Any]) -> Path:
    """An ONNX file of nothing but metadata: field 14 { key 1, value 2 }, lengths as varints."""

    def field(number: int, data: bytes) -> bytes:
        length, size = b"", len(data)
        while size >= 0x80:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    entry = field(1, METADATA_KEY.encode()) + field(2, json.dumps(fields).encode())
    path.write_bytes(b"\x08\x0a" + field(14, entry))
    return path


def read_manifest(fields: dict[str, Any], folder: Path) -> object:
    return Manifest.from_document(Document("manifest.json", fields))


def read_bundle(fields: dict[str, Any], folder: Path) -> object:
    path = toy.write(folder / "zoo").path
    (path / "manifest.json").write_text(json.dumps(fields))
    return Artifact.open(path)


def read_folded(fields: dict[str, Any], folder: Path) -> object:
    return Artifact.open(write_metadata(folder / "x.onnx", fields))


def read_prompt_set(fields: dict[str, Any], folder: Path) -> object:
    files = {"task.json": json.dumps(fields).encode(), "prompts.safetensors": b"of a form to come"}
    return CompiledPromptSet.decode(files, folder=folder)


def read_engine(fields: dict[str, Any], folder: Path) -> object:
    return EngineCard.from_document(Document("x.json", fields))


def read_card(fields: dict[str, Any], folder: Path) -> object:
    (folder / "task.json").write_text(json.dumps(fields))
    return inspect_path(folder)


def read_run(fields: dict[str, Any], folder: Path) -> object:
    pytest.importorskip("torch", reason="needs the train extra")
    from vpdeploy_train.run import Run

    (folder / "task.json").write_text(json.dumps(fields))
    return Run.read(folder)


READERS: dict[str, tuple[str, Callable[[dict[str, Any], Path], object]]] = {
    "manifest": ("vpdeploy.bundle", read_manifest),
    "bundle": ("vpdeploy.bundle", read_bundle),
    "folded": ("vpdeploy.folded", read_folded),
    "prompt set": ("vpdeploy.prompt-set", read_prompt_set),
    "prompt set, inspected": ("vpdeploy.prompt-set", read_card),
    "engine": ("vpdeploy.engine", read_engine),
    "run": (RUN_FORMAT, read_run),
    "run, inspected": (RUN_FORMAT, read_card),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_version_to_come_is_called_another_version_whatever_else_it_says(tmp_path: Path, reader: str):
    name, read = READERS[reader]
    fields = {"format": name, "format_version": 9, "shape": {"unknown": [1]}, "layout": {"digest": "of another rule"}}
    with pytest.raises(BundleVersionError, match="format version 9 is not readable, expected 1"):
        read(fields, tmp_path)


@pytest.mark.parametrize("reader", ["manifest", "bundle", "folded", "engine"])
def test_a_whole_document_of_a_version_to_come_is_not_called_damaged(tmp_path: Path, reader: str):
    artifact = Artifact.open(toy.write(tmp_path / "whole").path)
    written: dict[str, dict[str, Any]] = {
        "manifest": Bundle.open(artifact.path).manifest.to_fields(),
        "bundle": Bundle.open(artifact.path).manifest.to_fields(),
        "folded": json.loads(FoldedCard(task=toy.prompt_set().card, graph=artifact.graph).to_metadata()[METADATA_KEY]),
        "engine": card_of(artifact, b"engine").to_fields(),
    }
    fields = {**written[reader], "format_version": 4, "tensors_by_stage": {"0": []}}
    with pytest.raises(BundleVersionError, match="format version 4 is not readable"):
        READERS[reader][1](fields, tmp_path)
