from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core import toy

from vpdeploy.errors import (
    BundleCorruptError,
    BundleError,
    BundleVersionError,
    LayoutMismatchError,
    SpecError,
    TaskNotFoundError,
    VpdeployError,
)
from vpdeploy.format import bundle as bundle_module
from vpdeploy.format.bundle import (
    Bundle,
    collect_leftovers,
    is_bundle,
    publish_task,
    publish_tasks,
    read_consistently,
    roll_back_task,
    withdraw_task,
    write_bundle,
)
from vpdeploy.format.layout import Layout
from vpdeploy.partials import partial_folder

MANIFEST = "manifest.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "zoo").path


def load_all(path: Path) -> None:
    """Read everything a session reads."""
    bundle = Bundle.open(path)
    bundle.verified_graph()
    for task in bundle.tasks:
        bundle.read_task(task)


def changed_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads((path / MANIFEST).read_text())
    change(fields)
    (path / MANIFEST).write_text(json.dumps(fields))


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field and list item of a JSON document, as the keys that lead there."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*place, key)
        yield from places(child, (*place, key))


def parent_of(fields: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        fields = fields[key]
    return fields


# --- reading ---


def test_what_was_written_is_read(path: Path):
    bundle = Bundle.open(path)
    assert bundle.tasks == ("flowers", "birds")
    assert bundle.verified_graph().read_bytes() == b"not a graph"
    assert bundle.read_task("birds").encode() == toy.prompt_set("birds", prefix=5, classes=2, seed=1).encode()
    assert is_bundle(path)
    assert not is_bundle(path.parent)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="not a bundle"):
            Bundle.open(place)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_looked_into_is_one_clear_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(BundleError, match=f"zoo: cannot be read: {os.strerror(number)}"):
        is_bundle(path)


def test_a_file_is_no_bundle_and_called_a_file(path: Path):
    with pytest.raises(BundleError, match=r"model\.onnx: is a file, expected a bundle's folder"):
        Bundle.open(path / "model.onnx")


def test_a_manifest_without_any_one_of_its_fields_is_refused_by_name(path: Path):
    original = (path / MANIFEST).read_text()
    required = [
        place
        for place in places(json.loads(original))
        if isinstance(place[-1], str) and place not in (("tasks", "flowers"), ("tasks", "birds"))
    ]
    assert len(required) > 40
    for place in required:
        changed_manifest(path, lambda fields, place=place: parent_of(fields, place).pop(place[-1]))
        with pytest.raises(BundleError, match=r"manifest\.json|prompts\.safetensors|task\.json"):
            load_all(path)
        (path / MANIFEST).write_text(original)


@pytest.mark.parametrize(
    "value",
    [None, [], {}, -1, 2.5, True, "", "x", "../../x", [None], 10**400, [[0]]],
    ids=lambda value: repr(value)[:10],
)
def test_a_manifest_with_any_one_field_changed_is_read_or_refused_but_never_fails_otherwise(path: Path, value: Any):
    original = (path / MANIFEST).read_text()
    for place in list(places(json.loads(original))):
        kept = parent_of(json.loads(original), place)[place[-1]]

        def change(fields: dict[str, Any], place: tuple[Any, ...] = place) -> None:
            parent_of(fields, place)[place[-1]] = value

        changed_manifest(path, change)
        refusal: VpdeployError | None = None
        try:
            load_all(path)
        except (BundleError, LayoutMismatchError) as error:
            refusal = error
        if isinstance(refusal, LayoutMismatchError):
            assert "task 'flowers'" in str(refusal), place
        elif refusal is not None:
            assert any(suffix in str(refusal) for suffix in (".json", ".safetensors", ".onnx")), place
        else:  # only where the value is one of the same kind
            assert type(value) is type(kept) or {type(value), type(kept)} == {int, float}, place
        (path / MANIFEST).write_text(original)


@pytest.mark.parametrize("version", [0, 4, -1])
def test_another_format_version_is_refused_as_such(path: Path, version: int):
    changed_manifest(path, lambda fields: fields.update(format_version=version))
    with pytest.raises(BundleVersionError, match=f"format version {version} is not readable"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "file", [MANIFEST, "model.onnx", "tasks/birds/1/task.json", "tasks/birds/1/prompts.safetensors"]
)
def test_a_file_that_is_missing_cut_or_changed_is_named(path: Path, file: str):
    target = path / file
    data = target.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damage in (data[:-2], b"", data[: len(data) // 2], bytes(flipped)):
        target.write_bytes(damage)
        if file == MANIFEST and damage == bytes(flipped):
            continue  # one flipped bit may leave valid JSON; the fields are covered above
        with pytest.raises(BundleCorruptError, match=target.name):
            load_all(path)
    target.unlink()
    with pytest.raises(BundleError, match=target.name):
        load_all(path)
    target.mkdir()
    with pytest.raises(BundleError, match=target.name):
        load_all(path)


def test_a_prompt_set_of_another_task_is_noticed(path: Path):
    def swap(fields: dict[str, Any]) -> None:
        tasks = fields["tasks"]
        tasks["flowers"], tasks["birds"] = tasks["birds"], tasks["flowers"]

    changed_manifest(path, swap)
    folders = path / "tasks"
    (folders / "flowers").rename(folders / "x")
    (folders / "birds").rename(folders / "flowers")
    (folders / "x").rename(folders / "birds")
    with pytest.raises(BundleCorruptError, match=r"task\.json: describes task 'birds', not 'flowers'"):
        Bundle.open(path).read_task("flowers")


def test_a_damaged_task_leaves_the_others_readable(path: Path):
    (path / "tasks/birds/1/task.json").unlink()
    assert Bundle.open(path).read_task("flowers").card.name == "flowers"


# --- publishing ---


def test_publishing_adds_a_task_or_a_version(path: Path):
    assert publish_task(path, toy.prompt_set("new")) == 1
    assert publish_task(path, toy.prompt_set("flowers", seed=9)) == 2
    bundle = Bundle.open(path)
    assert bundle.tasks == ("flowers", "birds", "new")
    assert bundle.read_task("flowers").encode() == toy.prompt_set("flowers", seed=9).encode()
    assert sorted(bundle.manifest.tasks["flowers"].files) == [1, 2]


def test_rolling_back_serves_the_previous_version_and_keeps_the_later_one(path: Path):
    publish_task(path, toy.prompt_set("flowers", seed=9))
    assert roll_back_task(path, "flowers") == 1
    assert Bundle.open(path).read_task("flowers").encode() == toy.prompt_set("flowers").encode()
    assert publish_task(path, toy.prompt_set("flowers", seed=10)) == 3
    assert roll_back_task(path, "flowers") == 2


def test_rolling_back_the_first_version_is_refused(path: Path):
    with pytest.raises(SpecError, match="nothing to roll back to"):
        roll_back_task(path, "flowers")


def test_rolling_back_to_a_damaged_version_changes_nothing(path: Path):
    publish_task(path, toy.prompt_set("flowers", seed=9))
    (path / "tasks/flowers/1/prompts.safetensors").write_bytes(b"")
    before = toy.snapshot(path)
    with pytest.raises(BundleCorruptError, match=r"flowers/1/prompts\.safetensors"):
        roll_back_task(path, "flowers")
    assert toy.snapshot(path) == before


def test_withdrawing_removes_all_versions(path: Path):
    publish_task(path, toy.prompt_set("flowers", seed=9))
    withdraw_task(path, "flowers")
    assert Bundle.open(path).tasks == ("birds",)
    assert not (path / "tasks/flowers").exists()


def test_versions_of_a_task_grow_for_ever_whatever_becomes_of_it(path: Path):
    publish_task(path, toy.prompt_set("flowers", seed=2))
    withdraw_task(path, "flowers")
    publish_task(path, toy.prompt_set("new"))  # what is remembered outlives other changes
    assert publish_task(path, toy.prompt_set("flowers", seed=3)) == 3
    with pytest.raises(SpecError, match="no version before 3"):
        roll_back_task(path, "flowers")
    toy.write(path, toy.prompt_set("flowers", seed=4), graph=b"another graph")
    assert Bundle.open(path).versions == {"flowers": 4}
    assert publish_task(path, toy.prompt_set("birds")) == 2
    assert publish_task(path, toy.prompt_set("new")) == 2


@pytest.mark.parametrize("version", [0, -1, 10**12])
def test_a_last_version_that_is_none_is_refused(path: Path, version: int):
    withdraw_task(path, "birds")
    changed_manifest(path, lambda fields: fields["withdrawn"].update(birds=version))
    with pytest.raises(BundleCorruptError, match=r"manifest\.json: withdrawn: the last version of 'birds'"):
        Bundle.open(path)


def test_a_task_that_is_there_and_withdrawn_is_refused(path: Path):
    changed_manifest(path, lambda fields: fields["withdrawn"].update(birds=1))
    with pytest.raises(BundleCorruptError, match=r"manifest\.json: withdrawn: task 'birds' is in the bundle"):
        Bundle.open(path)


def test_folders_whose_names_are_no_versions_are_left_alone(path: Path):
    for name in ("²", "1.old", "01", "x"):
        (path / "tasks/flowers" / name).mkdir()
    assert publish_task(path, toy.prompt_set("flowers", seed=9)) == 2
    toy.write(path, toy.prompt_set("other"), graph=b"another graph")
    assert sorted(folder.name for folder in (path / "tasks/flowers").iterdir()) == ["01", "1.old", "x", "²"]


def test_unknown_tasks_cannot_be_withdrawn_or_rolled_back(path: Path):
    for change in (withdraw_task, roll_back_task):
        with pytest.raises(TaskNotFoundError, match="holds: flowers, birds"):
            change(path, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": replace(toy.BACKBONE, sha256="cd" * 32)}, "belongs to backbone toy .cdcdcdcdcdcd."),
        ({"preprocessing": replace(toy.PREPROCESSING, image_size=16)}, "image_size 16 != 8"),
        (
            {"layout": Layout.for_backbone(replace(toy.BACKBONE, depth=3), dtype="float32")},
            "export the run again for this bundle",
        ),
    ],
)
def test_a_prompt_set_that_does_not_fit_is_refused_and_nothing_is_written(
    path: Path, change: dict[str, Any], message: str
):
    before = toy.snapshot(path)
    with pytest.raises(LayoutMismatchError, match=f"task 'new'.*{message}"):
        publish_task(path, toy.prompt_set("new", **change))
    assert toy.snapshot(path) == before


@pytest.mark.parametrize("field", ["backbone", "layout"])
def test_a_mismatch_shows_where_digests_differ(path: Path, field: str):
    digest = toy.BACKBONE.sha256[:-1] + "0"
    change = (
        {"backbone": replace(toy.BACKBONE, sha256=digest)}
        if field == "backbone"
        else {"layout": Layout.for_backbone(replace(toy.BACKBONE, depth=3), dtype="float32")}
    )
    with pytest.raises(LayoutMismatchError) as caught:
        publish_task(path, toy.prompt_set("new", **change))
    found = re.findall(r"\b[0-9a-f]{12,64}\b", str(caught.value))
    assert len(found) == len(set(found)) == 2


@pytest.mark.parametrize("name", ["../up", "a/b", "", "."])
def test_a_name_that_leads_out_of_the_bundle_is_refused(path: Path, name: str):
    with pytest.raises(SpecError, match="cannot name a task"):
        publish_task(path, toy.prompt_set(name))
    assert Bundle.open(path).tasks == ("flowers", "birds")


# --- interruptions ---


def test_a_crash_before_the_manifest_leaves_the_old_state_and_the_next_publish_works(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = (path / MANIFEST).read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bundle_module, "_replace_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            publish_task(path, toy.prompt_set("flowers", seed=9))
    assert (path / MANIFEST).read_bytes() == before
    assert Bundle.open(path).read_task("flowers").encode() == toy.prompt_set("flowers").encode()
    version = publish_task(path, toy.prompt_set("flowers", seed=10))
    assert Bundle.open(path).read_task("flowers").encode() == toy.prompt_set("flowers", seed=10).encode()
    assert version > 1


@pytest.mark.parametrize("change", list(toy.CHANGES))
def test_a_full_disk_is_one_clear_error_and_leaves_the_old_state_at_every_step(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    before = toy.snapshot(path)
    calls = 0
    failing = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    while (path / MANIFEST).read_bytes() == before[MANIFEST]:  # replacing the manifest is the point of commitment
        failing += 1
        calls = 0
        refusal = ""
        try:
            toy.CHANGES[change](path)
        except BundleError as error:
            refusal = str(error)
        assert "the disk is full" in refusal or not refusal
        load_all(path)
        if (path / MANIFEST).read_bytes() == before[MANIFEST]:
            now = toy.snapshot(path)
            assert {name: now.get(name) for name in before} == before
    assert failing > 1
    load_all(path)
    assert not list(path.rglob("*.partial"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("change", ["publish", "replace"])
def test_a_process_killed_at_any_step_leaves_a_bundle_that_loads_and_changes_again(path: Path, change: str):
    program = (
        "import os, signal, sys; from pathlib import Path; from core import toy\n"
        "calls, real = 0, os.fsync\n"
        "def fsync(descriptor):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == int(sys.argv[3]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(descriptor)\n"
        "os.fsync = fsync\n"
        "toy.CHANGES[sys.argv[2]](Path(sys.argv[1]))\n"
    )
    before = toy.snapshot(path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for step in range(1, 20):
        finished = subprocess.run(
            [sys.executable, "-c", program, path, change, str(step)], env=environment, check=False
        )
        load_all(path)
        assert [name.name for name in path.parent.glob("*.partial")] == []
        if finished.returncode == 0:
            break
        assert finished.returncode == -signal.SIGKILL
        if toy.snapshot(path)[MANIFEST] == before[MANIFEST]:
            now = toy.snapshot(path)
            assert {name: now.get(name) for name in before} == before
    assert 2 < step < 19
    publish_task(path, toy.prompt_set("afterwards"))
    load_all(path)


def test_several_tasks_are_published_at_one_moment_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch):
    before = toy.snapshot(path)
    real, calls = bundle_module._with_version, 0

    def fail_the_second(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    both = [toy.prompt_set("new"), toy.prompt_set("flowers", seed=9)]
    with monkeypatch.context() as patched:
        patched.setattr(bundle_module, "_with_version", fail_the_second)
        with pytest.raises(BundleError, match="the disk is full; it is as it was before"):
            publish_tasks(path, both)
    assert toy.snapshot(path) == before
    assert publish_tasks(path, both) == {"new": 1, "flowers": 2}


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "zoo", toy.facts(), [toy.prompt_set()], _graph(tmp_path))


@pytest.mark.parametrize("process_count", [2])
def test_processes_that_publish_at_once_all_land(path: Path, process_count: int):
    program = (
        "import sys; from pathlib import Path; from core import toy; from vpdeploy.format.bundle import publish_task\n"
        "sys.stdin.read(1)\n"
        "for index in range(10):\n"
        "    publish_task(Path(sys.argv[1]), toy.prompt_set(f'{sys.argv[2]}-{index}'))\n"
        "    publish_task(Path(sys.argv[1]), toy.prompt_set('shared', seed=index))\n"
    )
    tests = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), f"task{number}"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": tests},
        )
        for number in range(process_count)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go")
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0] * process_count
    expected = {f"task{number}-{index}" for number in range(process_count) for index in range(10)}
    assert set(Bundle.open(path).tasks) == {"flowers", "birds", "shared"} | expected
    assert sorted(Bundle.open(path).manifest.tasks["shared"].files) == list(range(1, 10 * process_count + 1))
    load_all(path)


# --- writing a whole bundle ---


def _graph(folder: Path, data: bytes = b"graph") -> Path:
    staged = folder / "staged.onnx"
    staged.write_bytes(data)
    return staged


def test_a_bundle_is_written_over_nothing_or_an_empty_folder_only(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert toy.write(tmp_path / "empty").tasks == ("flowers", "birds")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("other", "file"):
        with pytest.raises(BundleError, match=f"{name}: exists and is not a bundle"):
            toy.write(tmp_path / name)
    assert (tmp_path / "other" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"


def test_a_prompt_set_that_does_not_fit_leaves_no_folder(tmp_path: Path):
    stranger = toy.prompt_set(preprocessing=replace(toy.PREPROCESSING, crop_ratio=0.5))
    with pytest.raises(LayoutMismatchError, match=r"crop_ratio 0\.5 != 0\.9"):
        toy.write(tmp_path / "zoo", stranger)
    assert not (tmp_path / "zoo").exists()


def test_replacing_a_bundle_leaves_nothing_of_the_old_one(path: Path):
    toy.write(path, toy.prompt_set("flowers", seed=5), toy.prompt_set("fish"), graph=b"another graph")
    bundle = Bundle.open(path)
    assert bundle.tasks == ("flowers", "fish")
    load_all(path)
    listed = {
        f"tasks/{task}/{version}/{file}"
        for task, entry in bundle.manifest.tasks.items()
        for version, files in entry.files.items()
        for file in files
    }
    assert set(toy.snapshot(path)) == {MANIFEST, bundle.manifest.graph_file, *listed}


def test_replacing_a_bundle_gives_its_tasks_new_versions_so_that_followers_notice(path: Path):
    before = Bundle.open(path).manifest.tasks["flowers"].version
    toy.write(path, toy.prompt_set("flowers", seed=5))
    assert Bundle.open(path).manifest.tasks["flowers"].version > before


def test_replacing_with_the_same_graph_keeps_its_file(path: Path):
    for graph in (b"another graph", b"another graph"):
        toy.write(path, graph=graph)
    assert Bundle.open(path).verified_graph().read_bytes() == b"another graph"
    assert len(list(path.glob("*.onnx"))) == 1


def test_alternating_graphs_leave_one_file_each_time(path: Path):
    for graph in (b"1", b"2", b"1", b"3"):
        toy.write(path, graph=graph)
        load_all(path)
        assert [file.read_bytes() for file in path.glob("*.onnx")] == [graph]


def test_a_bundle_can_be_moved(path: Path, tmp_path: Path):
    moved = Path(shutil.move(path, tmp_path / "elsewhere"))
    load_all(moved)
    publish_task(moved, toy.prompt_set("new"))


# --- reading while others write ---


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(path: Path):
    states: list[tuple[str, ...]] = []

    def read() -> tuple[str, ...]:
        bundle = Bundle.open(path)
        states.append(bundle.tasks)
        if len(states) == 1:
            toy.write(path, toy.prompt_set("fish"), graph=b"another graph")
        bundle.verified_graph()
        for task in bundle.tasks:
            bundle.read_task(task)
        return bundle.tasks

    assert read_consistently(path, read) == ("fish",)
    assert states == [("flowers", "birds"), ("fish",)]


def test_a_damaged_bundle_is_read_once(path: Path):
    (path / "model.onnx").unlink()
    calls = []

    def read() -> Path:
        calls.append(1)
        return Bundle.open(path).verified_graph()

    with pytest.raises(BundleCorruptError, match=r"model\.onnx: file is missing"):
        read_consistently(path, read)
    assert len(calls) == 1


def test_what_killed_processes_left_goes_with_the_next_change(path: Path):
    (path / ".manifest.json.abcdefgh.partial").write_bytes(b"half")
    (path / ".model.0123456789ab.onnx.abcdefgh.partial").write_bytes(b"half")
    (path / "tasks" / "flowers" / ".2.abcdefgh.partial").mkdir()
    (path / "notes.partial").write_bytes(b"mine")
    publish_task(path, toy.prompt_set("flowers", seed=2))
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*partial")) == ["notes.partial"]
    # A graph and versions that were complete, but never named, go when the bundle is replaced.
    (path / "model.0123456789ab.onnx").write_bytes(b"whole")
    (path / "model_mine.onnx").write_bytes(b"mine")
    (path / "tasks" / "never" / "1").mkdir(parents=True)
    toy.write(path, toy.prompt_set("flowers", seed=5))
    assert {file.name for file in path.glob("*.onnx")} == {"model.onnx", "model_mine.onnx"}
    assert [folder.name for folder in (path / "tasks").iterdir()] == ["flowers"]


# --- leftovers ---


def left_by_a_kill(path: Path) -> list[str]:
    """Make what killed commands leave, and files of the user beside; returns the names of the former."""
    shutil.copytree(path / "tasks/flowers/1", path / "tasks/flowers/5")
    shutil.copytree(path / "tasks/flowers/1", path / "tasks/gone/7")
    for folder in (path / "tasks/birds/.2.abcdefgh.partial", path.parent / f".{path.name}.abcdefgh.partial"):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"half")
    for file in ("model.0123456789ab.onnx", "model.0123456789ab.data", ".manifest.json.abcdefgh.partial"):
        (path / file).write_bytes(b"left")
    (path / "engines").mkdir()
    (path / "engines/.key.engine.abcdefgh.partial").write_bytes(b"half")
    for mine in ("model_mine.onnx", "notes.partial", "tasks/flowers/notes", "engines/mine.partial"):
        (path / mine).write_bytes(b"mine")
    return [
        ".manifest.json.abcdefgh.partial",
        "../.zoo.abcdefgh.partial",
        "engines/.key.engine.abcdefgh.partial",
        "model.0123456789ab.data",
        "model.0123456789ab.onnx",
        "tasks/birds/.2.abcdefgh.partial",
        "tasks/flowers/5",
        "tasks/gone/7",
    ]


def everything(path: Path) -> set[str]:
    return {os.path.relpath(each, path) for each in path.parent.rglob("*") if each.name != ".lock"}


@pytest.mark.parametrize("change", [*toy.CHANGES, "collect"])
def test_what_kills_left_is_reclaimed_by_the_next_change(path: Path, change: str):
    left = left_by_a_kill(path)
    (collect_leftovers if change == "collect" else toy.CHANGES[change])(path)
    assert not everything(path) & {*left, "tasks/gone"}
    assert {"model_mine.onnx", "notes.partial", "tasks/flowers/notes", "engines/mine.partial"} <= everything(path)
    load_all(path)


def test_a_dry_run_tells_what_would_be_removed_and_removes_nothing(path: Path):
    left, before = left_by_a_kill(path), everything(path)
    found = collect_leftovers(path, dry_run=True)
    assert sorted(os.path.relpath(each.path, path) for each in found) == sorted(left)
    assert {each.size_bytes for each in found if each.path.suffix == ".data"} == {4}
    assert everything(path) == before
    assert [each.path for each in collect_leftovers(path)] == [each.path for each in found]
    assert collect_leftovers(path) == []


def test_what_somebody_is_writing_beside_a_bundle_is_no_leftover(path: Path):
    with partial_folder(path) as folder:
        assert collect_leftovers(path) == []
        assert folder.is_dir()


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="holds are locks that Linux has")


@ON_LINUX
@pytest.mark.parametrize("change", ["withdraw", "replace"])
def test_what_a_process_holds_stays_until_it_ends_however_that_ends(path: Path, change: str):
    program = (
        "import sys; from pathlib import Path; from vpdeploy.format.holds import *\n"
        "names = [graph_name('model.onnx'), version_name('flowers', 1)]\n"
        "holds = Holds(Path(sys.argv[1]), lambda: names); holds.refresh()\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        toy.CHANGES[change](path)
        stays = {"withdraw": ["tasks/flowers/1"], "replace": ["model.onnx", "tasks/flowers/1"]}[change]
        found = collect_leftovers(path)
        assert [(str(each.path.relative_to(path)), each.is_held) for each in found] == [(name, True) for name in stays]
        assert all((path / name).exists() for name in stays)
        holder.kill()
    assert [each.is_held for each in collect_leftovers(path)] == [False] * len(stays)
    assert not any((path / name).exists() for name in stays)
    load_all(path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_a_file_of_holds_that_is_something_else_holds_nothing_up(path: Path, tmp_path: Path, kind: str):
    place = path / ".holds"
    place.unlink()
    other = tmp_path / "other"
    other.write_text("mine")
    {"fifo": lambda: os.mkfifo(place), "folder": place.mkdir, "link": lambda: place.symlink_to(other)}[kind]()
    withdraw_task(path, "birds")
    assert collect_leftovers(path) == []
    assert other.read_text() == "mine"
