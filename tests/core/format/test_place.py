from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from core import toy

from vpdeploy.errors import BundleCorruptError, BundleError, LayoutMismatchError, SpecError
from vpdeploy.format.bundle import publish_task
from vpdeploy.format.place import Existing, check_bundle_place, check_file_place, check_update

GOLDEN = Path(__file__).parents[2] / "golden" / "version1"
RGB = GOLDEN / "bytes.onnx"  # the task rgb, folded


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "zoo").path


# --- a bundle's folder ---


@pytest.mark.parametrize(
    ("tasks", "losses"),
    [
        (["flowers"], "would drop task birds and the versions so far of flowers (1, 2);"),
        (["new"], "would drop tasks flowers, birds;"),
        (["flowers", "birds"], "would drop the versions so far of flowers (1, 2), birds (1);"),
    ],
)
def test_a_bundle_is_not_written_anew_and_what_it_would_lose_is_named(zoo: Path, tasks: list[str], losses: str):
    publish_task(zoo, toy.prompt_set("flowers", seed=3))
    with pytest.raises(BundleError, match="give --update to keep what is there, or --replace to drop it") as refused:
        check_bundle_place(zoo, tasks, "refuse")
    assert losses in str(refused.value)
    check_bundle_place(zoo, tasks, "update")
    check_bundle_place(zoo, tasks, "replace")


def test_a_bundle_of_many_tasks_is_still_one_line(tmp_path: Path):
    zoo = toy.write(tmp_path / "zoo", *(toy.prompt_set(f"task-{index}") for index in range(9))).path
    with pytest.raises(BundleError, match="task-4 and 4 more; give"):
        check_bundle_place(zoo, ["new"], "refuse")


@pytest.mark.parametrize("existing", ["refuse", "replace"])
def test_nothing_and_an_empty_folder_can_be_written(tmp_path: Path, existing: Existing):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("none", "empty", "link", "dangling"):
        check_bundle_place(tmp_path / name, ["new"], existing)


def test_an_update_needs_a_bundle(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(BundleError, match=f"{name}: there is no bundle to update; leave --update out"):
            check_bundle_place(tmp_path / name, ["new"], "update")


@pytest.mark.parametrize("existing", ["refuse", "update", "replace"])
def test_what_is_no_bundle_is_never_touched(tmp_path: Path, existing: Existing):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("precious")
    for name in ("file", "folder"):
        with pytest.raises(BundleError, match=f"{name}: exists and is not a bundle"):
            check_bundle_place(tmp_path / name, ["new"], existing)
    with pytest.raises(BundleError, match="null: exists and is not a bundle"):
        check_bundle_place(Path(os.devnull), ["new"], existing)


def test_a_damaged_manifest_is_told_as_such(zoo: Path):
    (zoo / "manifest.json").write_text("{")
    with pytest.raises(BundleCorruptError, match="not valid JSON"):
        check_bundle_place(zoo, ["new"], "refuse")


# --- what an update can take ---


def test_an_update_takes_what_the_graph_has(zoo: Path):
    cards = [toy.prompt_set("new").card]
    assert check_update(zoo, cards).tasks == ("flowers", "birds")
    check_update(zoo, cards, precision="fp32", opset=20, family="prefix")


def test_an_update_to_another_graph_says_what_does_not_fit(zoo: Path):
    cards = [toy.prompt_set("new").card]
    advice = "and {} was asked for; an update keeps the graph: leave that out, or export .* with --replace"
    with pytest.raises(SpecError, match="precision fp32, " + advice.format("fp16")):
        check_update(zoo, cards, precision="fp16")
    with pytest.raises(SpecError, match="opset 20, " + advice.format("23")):
        check_update(zoo, cards, opset=23)
    with pytest.raises(SpecError, match="layout prefix, " + advice.format("superset")):
        check_update(zoo, cards, family="superset")


def test_an_update_of_another_backbone_says_so(zoo: Path):
    other = toy.prompt_set("new", backbone=replace(toy.BACKBONE, sha256="cd" * 32)).card
    with pytest.raises(LayoutMismatchError, match=r"'new' belongs to backbone toy .* export it into another bundle"):
        check_update(zoo, [toy.prompt_set("flowers").card, other])


# --- a folded model's file ---


def test_a_folded_model_replaces_one_of_its_own_task_only(tmp_path: Path):
    path = Path(shutil.copy(RGB, tmp_path / "task.onnx"))
    check_file_place(path, "rgb", "refuse")
    with pytest.raises(BundleError, match="holds task 'rgb', not task 'flowers'; give another --out, or --replace"):
        check_file_place(path, "flowers", "refuse")
    check_file_place(path, "flowers", "replace")


def test_a_folded_model_is_written_over_nothing_and_an_empty_file(tmp_path: Path):
    (tmp_path / "empty.onnx").touch()
    for name in ("none.onnx", "empty.onnx"):
        check_file_place(tmp_path / name, "rgb", "refuse")


@pytest.mark.parametrize("existing", ["refuse", "replace"])
@pytest.mark.parametrize("content", [b"my thesis", GOLDEN / "zoo" / "model.onnx"], ids=["text", "another graph"])
def test_a_file_that_no_export_wrote_is_never_replaced(tmp_path: Path, existing: Existing, content: bytes | Path):
    path = tmp_path / "task.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    with pytest.raises(BundleError, match="exists and was not written by vpdeploy export"):
        check_file_place(path, "rgb", existing)


def test_a_folder_and_a_device_are_no_place_for_a_file(tmp_path: Path):
    with pytest.raises(BundleError, match="is a folder"):
        check_file_place(tmp_path, "rgb", "replace")
    with pytest.raises(BundleError, match="exists and is not a file"):
        check_file_place(Path(os.devnull), "rgb", "replace")


def test_a_folded_model_has_nothing_to_update(tmp_path: Path):
    with pytest.raises(SpecError, match="--update is for bundles"):
        check_file_place(tmp_path / "x.onnx", "rgb", "update")


# --- places that cannot be written ---


def test_a_file_on_the_way_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"zoo: cannot be written, .*file is not a folder"):
        check_bundle_place(tmp_path / "file" / "a" / "zoo", ["new"], "refuse")
    with pytest.raises(BundleError, match="file is not a folder"):
        check_file_place(tmp_path / "file" / "x.onnx", "rgb", "refuse")


def test_a_read_only_place_is_named(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (zoo, tmp_path))
    with pytest.raises(BundleError, match=f"{zoo}: cannot be written, {zoo} is read-only here"):
        check_bundle_place(zoo, ["new"], "update")
    with pytest.raises(BundleError, match="read-only"):
        check_update(zoo, [toy.prompt_set("new").card])
    with pytest.raises(BundleError, match=f"{tmp_path} is read-only here"):
        check_bundle_place(tmp_path / "a" / "new", ["new"], "refuse")
    with pytest.raises(BundleError, match=f"{tmp_path} is read-only here"):
        check_file_place(tmp_path / "x.onnx", "rgb", "refuse")
