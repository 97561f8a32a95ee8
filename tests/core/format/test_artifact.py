from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, BundleError, LayoutMismatchError, SpecError, TaskNotFoundError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import publish_task, withdraw_task
from vpdeploy.format.datafile import DataFile
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import GraphFacts, ImageInput
from vpdeploy.format.interface import Binding


def bundle_of(tmp_path: Path) -> Artifact:
    return Artifact.open(toy.write(tmp_path / "zoo").path)


def folded(path: Path, image_input: ImageInput = "uint8", classes: int = 4) -> Artifact:
    graph = GraphFacts(precision="fp16", opset=23, image_input=image_input)
    return Artifact.of_folded(path, FoldedCard(task=toy.prompt_set(classes=classes).card, graph=graph))


def test_a_bundle_says_what_its_manifest_says(tmp_path: Path):
    artifact = bundle_of(tmp_path)
    assert (artifact.path, artifact.graph_path) == (tmp_path / "zoo", tmp_path / "zoo" / "model.onnx")
    assert (artifact.precision, artifact.opset, artifact.image_input) == ("fp32", 20, "uint8")
    assert (artifact.backbone, artifact.preprocessing, artifact.layout) == (
        toy.BACKBONE,
        toy.PREPROCESSING,
        toy.LAYOUT,
    )
    assert artifact.sha256 == sha256_of_file(artifact.graph_path)
    assert artifact.graph_bytes == len(b"not a graph")
    assert artifact.engines_folder == tmp_path / "zoo" / "engines"
    assert artifact.is_switchable


def test_the_tasks_of_a_bundle_are_read_in_its_order(tmp_path: Path):
    artifact = bundle_of(tmp_path)
    assert artifact.tasks == ("flowers", "birds")
    assert artifact.versions == {"flowers": 1, "birds": 1}
    assert [each.card.name for each in artifact.read_prompt_sets()] == ["flowers", "birds"]
    assert {name: len(card.labels) for name, card in artifact.cards.items()} == {"flowers": 4, "birds": 2}


def test_a_prompt_set_is_read_when_it_is_asked_for_so_that_a_damaged_one_hides_no_other(tmp_path: Path):
    (toy.write(tmp_path / "zoo").path / "tasks" / "birds" / "1" / "task.json").write_text("{}")
    artifact = Artifact.open(tmp_path / "zoo")
    assert artifact.tasks == ("flowers", "birds")
    assert artifact.read_prompt_set("flowers").card.name == "flowers"
    for read in (artifact.read_prompt_sets, lambda: artifact.read_prompt_set("birds"), lambda: artifact.cards):
        with pytest.raises(BundleCorruptError, match=r"birds.*task\.json: contents do not match"):
            read()


def test_an_opened_bundle_stays_the_one_of_then(tmp_path: Path):
    artifact = bundle_of(tmp_path)
    before = artifact.read_prompt_set("flowers").encode()
    publish_task(artifact.path, toy.prompt_set("flowers", seed=7))
    assert artifact.versions["flowers"] == 1
    assert artifact.read_prompt_set("flowers").encode() == before
    withdraw_task(artifact.path, "birds")
    with pytest.raises(BundleCorruptError, match="birds"):
        artifact.read_prompt_set("birds")


def test_an_artifact_cannot_be_changed(tmp_path: Path):
    artifact = bundle_of(tmp_path)
    with pytest.raises(FrozenInstanceError):
        artifact.path = tmp_path  # type: ignore[misc]


def test_the_graph_of_a_bundle_is_compared_when_it_is_opened(tmp_path: Path):
    path = toy.write(tmp_path / "zoo").path
    (path / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleCorruptError, match=r"model\.onnx: contents do not match"):
        Artifact.open(path)


@pytest.mark.parametrize(
    ("name", "complaint"), [("none", "does not exist"), ("empty", "is neither"), ("x.txt", "not an .onnx file")]
)
def test_what_is_no_artifact_is_refused_by_name(tmp_path: Path, name: str, complaint: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(BundleError, match=f"{name}: {complaint}"):
        Artifact.open(tmp_path / name)


def test_a_folded_model_holds_one_task_and_no_table(tmp_path: Path):
    (tmp_path / "task.onnx").write_bytes(b"graph")
    artifact = folded(tmp_path / "task.onnx")
    assert not artifact.is_switchable
    assert (artifact.tasks, artifact.versions, artifact.bundle) == (("flowers",), {}, None)
    assert artifact.cards["flowers"] == toy.prompt_set().card
    assert artifact.read_prompt_sets() == ()
    assert (artifact.precision, artifact.opset) == ("fp16", 23)
    assert artifact.sha256 == sha256_of_file(tmp_path / "task.onnx")
    with pytest.raises(TaskNotFoundError, match="holds no prompt set of a task 'flowers'"):
        artifact.read_prompt_set("flowers")
    with pytest.raises(SpecError, match="a folded model holds one task"):
        artifact.with_prompt_sets([toy.prompt_set()])


def test_a_data_file_counts_among_the_graphs_bytes(tmp_path: Path):
    (tmp_path / "task.onnx").write_bytes(b"graph")
    data = DataFile(name="task.0.data", sha256="0" * 64, size_bytes=4000)
    assert replace(folded(tmp_path / "task.onnx"), data=data).graph_bytes == 4005


# --- the interface ---


@pytest.mark.parametrize(
    ("image_input", "binding"),
    [
        ("uint8", Binding(dtype="uint8", shape=("batch", 8, 8, 3))),
        ("float", Binding(dtype="float32", shape=("batch", 3, 8, 8))),
    ],
)
def test_a_folded_models_interface_follows_its_recorded_image_input(
    tmp_path: Path, image_input: ImageInput, binding: Binding
):
    interface = folded(tmp_path / "task.onnx", image_input, classes=7).interface
    assert interface.inputs == {"image": binding}
    assert interface.outputs == {"logits": Binding(dtype="float32", shape=("batch", 7))}


def test_a_bundles_interface_follows_its_layout(tmp_path: Path):
    interface = bundle_of(tmp_path).interface
    assert list(interface.inputs) == ["image", "slot", *(spec.name for spec in toy.LAYOUT.tensors)]
    assert interface.inputs["slot"] == Binding(dtype="int32", shape=("batch",))
    assert interface.inputs["prefix_bias"] == Binding(dtype="float32", shape=("slots", 2, "prefix"))
    assert interface.outputs == {"logits": Binding(dtype="float32", shape=("batch", "classes"))}


# --- in memory ---


def test_a_graph_that_is_not_published_yet_has_its_tasks_in_memory(tmp_path: Path):
    sets = [toy.prompt_set("b"), toy.prompt_set("a")]
    artifact = Artifact.of_staged(tmp_path / "staged.onnx", toy.facts(), sets)
    assert (artifact.tasks, artifact.versions, artifact.bundle) == (("b", "a"), {}, None)
    assert artifact.read_prompt_sets() == tuple(sets)
    assert artifact.read_prompt_set("a") is sets[1]
    assert artifact.cards == {"b": sets[0].card, "a": sets[1].card}


def test_other_tasks_of_the_same_graph_leave_the_artifact_as_it_is(tmp_path: Path):
    artifact = bundle_of(tmp_path)
    other = artifact.with_prompt_sets([toy.prompt_set("new")])
    assert (other.tasks, artifact.tasks) == (("new",), ("flowers", "birds"))
    assert (other.graph_path, other.sha256, other.interface) == (
        artifact.graph_path,
        artifact.sha256,
        artifact.interface,
    )


def test_tasks_that_the_graph_cannot_switch_to_are_refused(tmp_path: Path):
    stranger = toy.prompt_set(backbone=replace(toy.BACKBONE, sha256="c" * 64))
    with pytest.raises(LayoutMismatchError, match="belongs to backbone"):
        bundle_of(tmp_path).with_prompt_sets([stranger])
    with pytest.raises(LayoutMismatchError, match="belongs to backbone"):
        Artifact.of_staged(tmp_path / "staged.onnx", toy.facts(), [stranger])
