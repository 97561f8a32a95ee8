from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core import toy
from typer.testing import CliRunner, Result

from vpdeploy import __version__
from vpdeploy.cli import exits
from vpdeploy.cli.main import build_app, main
from vpdeploy.errors import (
    BundleCorruptError,
    MissingExtraError,
    ParityError,
    SpecError,
    VpdeployError,
)
from vpdeploy.format.bundle import Bundle, publish_task

Invoke = Callable[..., Result]
Captured = tuple[int, str, str]


@pytest.fixture
def invoke() -> Invoke:
    """Run a verb that should succeed."""

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(build_app(), [str(each) for each in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return call


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Captured]:
    """Run the whole entry point in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> Captured:
        monkeypatch.setattr(sys, "argv", ["vpdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(str(stopped.value.code)), out, err

    return call


@pytest.fixture
def image(tmp_path: Path, random_pixels: Callable[..., np.ndarray]) -> Path:
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow")
    path = tmp_path / "image.png"
    pillow.fromarray(random_pixels(1)[0]).save(path)
    return path


@pytest.fixture
def toy_zoo(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "toy zoo").path


def subprocess_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vpdeploy", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def assert_one_line_error(captured: Captured, code: int, message: str) -> None:
    found, out, err = captured
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert message in err
    assert found == code


# --- waiting threads ---


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE"), ("", "")])
def test_waiting_threads_sleep_unless_the_environment_says_otherwise(
    run_main: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert run_main("--version") == (0, f"{__version__}\n", "")
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_the_wait_policy_is_set_before_any_verb_is_loaded(
    run_main: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    found: list[str | None] = []

    def load(**_: str) -> list[object]:
        found.append(os.environ.get("OMP_WAIT_POLICY"))
        return []

    monkeypatch.setattr("vpdeploy.cli.main.entry_points", load)
    run_main("--version")
    assert found == ["PASSIVE"]


def test_the_packages_leave_a_programs_environment_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    build_app()
    assert "OMP_WAIT_POLICY" not in os.environ


# --- predict ---


def test_predict_prints_the_same_numbers_as_text_and_json(invoke: Invoke, zoo: Path, image: Path):
    text = invoke("predict", zoo, image, "--task", "birds", "--top", 3).stdout
    rows = json.loads(invoke("predict", zoo, image, "--task", "birds", "--top", 3, "--json").stdout)
    (row,) = rows
    assert (row["image"], row["task"], len(row["predictions"])) == (str(image), "birds", 3)
    for each in row["predictions"]:
        assert each["label"] == f"birds-{each['index']}"
        assert f"{each['probability']:7.2%}  {each['label']}" in text


def test_predict_answers_each_image_in_order(invoke: Invoke, folded_flowers: Path, image: Path, tmp_path: Path):
    other = tmp_path / "other.png"
    shutil.copy(image, other)
    rows = json.loads(invoke("predict", folded_flowers, image, other, "--json", "--threads", 1).stdout)
    assert [row["image"] for row in rows] == [str(image), str(other)]
    first, second = (row["predictions"] for row in rows)
    assert [each["label"] for each in first] == [each["label"] for each in second]
    # Rows of one batch are rows of one matrix product; which of them are summed together differs by place.
    assert [each["probability"] for each in first] == pytest.approx([each["probability"] for each in second], abs=1e-6)
    assert sum(each["probability"] for each in rows[0]["predictions"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "several tasks are loaded, name one of: flowers, birds, probe"),
        ({"task": "fish"}, "no task 'fish'; loaded: flowers, birds, probe"),
        ({"image": "none.png", "task": "birds"}, "none.png: file not found"),
        ({"model": "none"}, "none: does not exist; expected a bundle folder or an .onnx file"),
        ({"runtime": "gpu"}, "unknown runtime 'gpu'"),
    ],
    ids=str,
)
def test_what_predict_cannot_use_is_one_line(
    run_main: Callable[..., Captured], zoo: Path, image: Path, change: dict[str, str], message: str
):
    arguments: list[object] = ["predict", change.get("model", zoo), change.get("image", image)]
    for option in ("task", "runtime"):
        if option in change:
            arguments += [f"--{option}", change[option]]
    assert_one_line_error(run_main(*arguments), 1, message)


# --- task ---


def test_task_list_shows_versions_classes_and_bytes(invoke: Invoke, toy_zoo: Path):
    publish_task(toy_zoo, toy.prompt_set("flowers", prefix=6, seed=3))
    rows = json.loads(invoke("task", "list", toy_zoo, "--json").stdout)
    assert rows[0] == {
        "task": "flowers",
        "version": 2,
        "versions": [1, 2],
        "classes": 4,
        "prefix": 6,
        "generated": 0,
        "size_bytes": toy.prompt_set(prefix=6).size_bytes,
    }
    assert [row["task"] for row in rows] == ["flowers", "birds"]
    text = invoke("task", "list", toy_zoo).stdout
    assert "flowers" in text
    assert "version 2 of [1, 2], 4 classes, 6 prompts a block" in text


def test_task_remove_and_rollback_change_the_bundle(invoke: Invoke, toy_zoo: Path):
    publish_task(toy_zoo, toy.prompt_set("flowers", seed=3))
    assert "version 1" in invoke("task", "rollback", toy_zoo, "flowers").stdout
    assert Bundle.open(toy_zoo).manifest.tasks["flowers"].version == 1
    assert "removed birds" in invoke("task", "remove", toy_zoo, "birds").stdout
    assert Bundle.open(toy_zoo).tasks == ("flowers",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("remove", "fish"), "no task 'fish' in the bundle; it holds: flowers, birds"),
        (("rollback", "fish"), "no task 'fish'"),
        (("rollback", "birds"), "nothing to roll back to"),
    ],
    ids=str,
)
def test_what_task_cannot_do_is_one_line_and_changes_nothing(
    run_main: Callable[..., Captured], toy_zoo: Path, arguments: tuple[str, str], message: str
):
    before = toy.snapshot(toy_zoo)
    verb, task = arguments
    assert_one_line_error(run_main("task", verb, toy_zoo, task), 1, message)
    assert toy.snapshot(toy_zoo) == before


def test_task_remove_and_rollback_answer_in_json_when_asked(invoke: Invoke, toy_zoo: Path):
    publish_task(toy_zoo, toy.prompt_set("flowers", seed=3))
    assert json.loads(invoke("task", "rollback", toy_zoo, "flowers", "--json").stdout) == {
        "task": "flowers",
        "version": 1,
    }
    assert json.loads(invoke("task", "remove", toy_zoo, "flowers", "--json").stdout) == {
        "task": "flowers",
        "versions": [1, 2],
    }
    assert Bundle.open(toy_zoo).tasks == ("birds",)


def test_task_list_shows_the_healthy_tasks_beside_a_damaged_one(run_main: Callable[..., Captured], toy_zoo: Path):
    (toy_zoo / "tasks/flowers/1/prompts.safetensors").write_bytes(b"tampered")
    code, out, err = run_main("task", "list", toy_zoo)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: task 'flowers': ")
    assert "contents do not match the manifest's sha256" in err
    flowers, birds = out.splitlines()
    assert "damaged" in flowers
    assert "2 classes" in birds
    code, out, err = run_main("task", "list", toy_zoo, "--json")
    assert code == 1
    flowers, birds = json.loads(out)
    assert (flowers["task"], flowers["version"], flowers["versions"]) == ("flowers", 1, [1])
    assert "sha256" in flowers["damage"]
    assert (birds["task"], "damage" in birds) == ("birds", False)


# --- inspect ---


def test_inspect_explains_a_bundle(invoke: Invoke, zoo: Path):
    report = json.loads(invoke("inspect", zoo, "--json").stdout)
    assert report["kind"] == "bundle"
    assert [task["name"] for task in report["tasks"]] == ["flowers", "birds", "probe"]
    assert [task["classes"] for task in report["tasks"]] == [4, 7, 2]
    # Blocks keep 3 + 2, 0 + 1 and 1 + 2 prompts; the longest counts.
    assert [task["prefix"] for task in report["tasks"]] == [5, 10, 0]
    assert report["graph"]["size_bytes"] == (zoo / "model.onnx").stat().st_size
    assert all(task["parity"]["images"] > 0 for task in report["tasks"])
    text = invoke("inspect", zoo).stdout
    assert "kind: bundle" in text
    assert "flowers" in text


@pytest.mark.parametrize("version", ["served", "kept"])
def test_inspect_names_a_tampered_task_and_graph_and_tells_the_rest(
    run_main: Callable[..., Captured], zoo_copy: Path, version: str
):
    publish_task(zoo_copy, Bundle.open(zoo_copy).read_task("birds"))
    number = 2 if version == "served" else 1
    (zoo_copy / f"tasks/birds/{number}/task.json").write_text("{}")
    (zoo_copy / "model.onnx").write_bytes(b"tampered")
    code, out, err = run_main("inspect", zoo_copy, "--json")
    report = json.loads(out)
    assert (code, err.count("\n")) == (1, 1)
    assert len(report["damage"]) == 2
    for each, file in zip(report["damage"], ("model.onnx", f"birds/{number}/task.json"), strict=True):
        assert f"{file}: contents do not match" in each
        assert each in err
    assert [task["name"] for task in report["tasks"]] == ["flowers", "birds", "probe"]
    assert ("damage" in report["tasks"][1]) == (version == "served")
    assert report["backbone"]["depth"] == 3
    code, out, err = run_main("inspect", zoo_copy)
    assert code == 1
    assert "damage:\n  - " in out
    damaged = run_main("inspect", zoo_copy / f"tasks/birds/{number}")
    assert damaged[0] == 1


def test_inspect_names_a_tampered_prompt_set_of_a_bundle(run_main: Callable[..., Captured], toy_zoo: Path):
    folder = toy_zoo / "tasks/birds/1"
    assert json.loads(run_main("inspect", folder, "--json")[1])["checked"]
    (folder / "prompts.safetensors").write_bytes(b"tampered")
    code, out, err = run_main("inspect", folder, "--json")
    assert (code, json.loads(out)["task"]) == (1, "birds")
    assert "prompts.safetensors: contents do not match the manifest's sha256" in err


def test_a_missing_graph_is_named_by_inspect(run_main: Callable[..., Captured], toy_zoo: Path):
    (toy_zoo / "model.onnx").unlink()
    code, out, err = run_main("inspect", toy_zoo, "--json")
    assert (code, len(json.loads(out)["tasks"])) == (1, 2)
    assert "model.onnx: file is missing" in err


def test_inspect_explains_a_folded_model(invoke: Invoke, folded_flowers: Path):
    report = json.loads(invoke("inspect", folded_flowers, "--json").stdout)
    assert (report["kind"], report["task"]) == ("folded model", "flowers")
    assert report["labels"] == [f"flowers-{index}" for index in range(4)]
    assert report["input"] == "image uint8 [B, H, W, 3]"
    assert "folded model" in invoke("inspect", folded_flowers).stdout


def test_inspect_explains_a_run_and_a_compiled_prompt_set(invoke: Invoke, zoo: Path, tiny_run_paths: dict[str, Path]):
    run = json.loads(invoke("inspect", tiny_run_paths["flowers"], "--json").stdout)
    assert (run["kind"], run["task"], run["method"]) == ("run", "flowers", "e2vpt")
    assert set(run["files_bytes"]) == {"task.json", "prompts.safetensors"}
    compiled = json.loads(invoke("inspect", zoo / "tasks/birds/1", "--json").stdout)
    assert (compiled["kind"], compiled["task"]) == ("compiled prompt set", "birds")
    assert "birds" in invoke("inspect", zoo / "tasks/birds/1").stdout


@pytest.mark.parametrize(
    "details", [{"metrics": None}, {"parity": "lost"}, {"metrics": [1]}, {"pruning": [1]}], ids=str
)
def test_inspect_is_not_confused_by_free_form_details(invoke: Invoke, tmp_path: Path, details: dict[str, Any]):
    path = toy.write(tmp_path / "zoo", toy.prompt_set(**details)).path
    assert "flowers" in invoke("inspect", path).stdout
    assert "flowers" in invoke("inspect", path / "tasks/flowers/1").stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none: does not exist; expected a run folder, a bundle folder, an .onnx file of vpdeploy export"),
        ("text.onnx", "text.onnx: not an ONNX file, or truncated"),
        ("empty", "empty: is none of these"),
        ("foreign", "task.json: unknown format 'other'"),
    ],
)
def test_inspect_says_what_it_expected(run_main: Callable[..., Captured], tmp_path: Path, name: str, message: str):
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "task.json").write_text('{"format": "other"}')
    assert_one_line_error(run_main("inspect", tmp_path / name), 1, message)


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "tasks/flowers/1/task.json"])
def test_a_damaged_bundle_is_one_line_that_names_the_file(run_main: Callable[..., Captured], toy_zoo: Path, file: str):
    (toy_zoo / file).write_bytes((toy_zoo / file).read_bytes()[:-3])
    code, out, err = run_main("inspect", toy_zoo)
    # What is left is told, unless nothing says what it is.
    assert_one_line_error((code, "", err), 1, Path(file).name)
    assert bool(out) == (file != "manifest.json")


# --- exit codes ---


def test_version_is_printed(run_main: Callable[..., Captured]):
    assert run_main("--version") == (0, f"{__version__}\n", "")


def test_help_lists_the_verbs(run_main: Callable[..., Captured]):
    code, out, err = run_main("--help")
    assert (code, err) == (0, "")
    verbs = ("train", "eval", "import", "export", "predict", "bench", "serve", "inspect", "task")
    assert all(f"\n  {verb}" in out for verb in verbs)


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("predict",), ("inspect", "a", "--nope"), ("predict", "a", "b", "--top", "0"), ("task", "x")],
)
def test_wrong_usage_exits_2_and_prints_nothing_to_stdout(
    run_main: Callable[..., Captured], arguments: tuple[str, ...]
):
    code, out, err = run_main(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_the_process_exits_with_the_code_and_one_line(toy_zoo: Path, tmp_path: Path):
    (toy_zoo / "model.onnx").write_bytes(b"x")
    for arguments, code in (
        (("task", "list", toy_zoo), 0),
        (("inspect", toy_zoo.parent), 1),
        (("task", "remove", tmp_path, "x"), 1),
        (("fly",), 2),
    ):
        finished = subprocess_run(*arguments)
        assert finished.returncode == code
        if code == 1:
            assert_one_line_error((finished.returncode, finished.stdout, finished.stderr), 1, "error: ")


def test_debug_shows_a_traceback(tmp_path: Path):
    finished = subprocess_run("--debug", "inspect", tmp_path)
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "BundleError" in finished.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently on Windows")
def test_a_reader_that_goes_away_is_no_traceback(zoo: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "vpdeploy", "inspect", str(zoo), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VpdeployError("x"), 1),
        (SpecError("x"), 1),
        (BundleCorruptError("x"), 1),
        (MissingExtraError("torch", "train"), 3),
        (ParityError("x"), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_its_exit_code(error: VpdeployError, code: int):
    assert exits.exit_code(error) == code


def test_every_optional_module_names_its_extra():
    assert str(exits.missing_extra(ModuleNotFoundError(name="torch.nn"))) == (
        "'torch' is not installed: pip install 'vpdeploy[train]'"
    )
    assert exits.missing_extra(ModuleNotFoundError(name="vpdeploy.nothing")) is None
    assert exits.missing_extra(ModuleNotFoundError("unnamed")) is None


def test_an_operating_system_error_is_one_line(
    run_main: Callable[..., Captured], toy_zoo: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(toy_zoo / "manifest.json"))

    monkeypatch.setattr("vpdeploy.inspection.report.is_bundle", fail)
    assert_one_line_error(run_main("inspect", toy_zoo), 1, "manifest.json: Permission denied")


def test_an_error_of_several_lines_is_joined(
    run_main: Callable[..., Captured], toy_zoo: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise SpecError("first\n  second")

    monkeypatch.setattr("vpdeploy.inspection.report.is_bundle", fail)
    assert_one_line_error(run_main("inspect", toy_zoo), 1, "error: first second\n")


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


OUT_OF_MEMORY = {
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 9437184000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch on a GPU": OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity ..."
    ),
    "NumPy": MemoryError("Unable to allocate 74.5 GiB for an array with shape (100000, 100000) and data type float64"),
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory"),
    "a worker": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
@pytest.mark.parametrize(
    ("verb", "doing", "advice"),
    [
        ("train", "training", "lower --batch-size, --image-size or --workers"),
        ("sweep", "a trial was training", "lower --batch-size"),
        ("eval", "evaluating", "lower --batch-size"),
        ("export", "exporting", "export fewer runs at once"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(run_main, monkeypatch, error, verb, doing, advice):
    def fail(*_: object) -> Callable[[], None]:
        raise error

    monkeypatch.setattr("vpdeploy.cli.main.build_app", fail)
    code, out, err = run_main(verb, "anything")
    assert (code, out) == (exits.KNOWN_ERROR, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "memory ran out while " + doing in err
    assert advice in err


def test_what_could_not_be_had_is_told(run_main, monkeypatch):
    for key, amount in {
        "torch on a CPU": "9437184000 bytes",
        "torch on a GPU": "2.00 GiB",
        "NumPy": "74.5 GiB",
    }.items():

        def fail(*_: object, key: str = key) -> None:
            raise OUT_OF_MEMORY[key]

        monkeypatch.setattr("vpdeploy.cli.main.build_app", fail)
        assert f", {amount} more could not be had" in run_main("train")[2]


def test_another_runtime_error_is_still_a_bug(run_main, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("vpdeploy.cli.main.build_app", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_main("train")


# --- errors as JSON ---


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "message"),
    [
        (("inspect", "none", "--json"), "BundleError", 1, "none: does not exist"),
        (("task", "list", "none", "--json"), "BundleError", 1, "none"),
        (("predict", "none", "a.png", "--runtime", "gpu", "--json"), "SpecError", 1, "unknown runtime 'gpu'"),
        (("bench", "none", "--json", "--batch-sizes", "x"), "SpecError", 1, "--batch-sizes x"),
        (("build", "none", "--json"), "BundleError", 1, "none"),
        (("train", "--data", "digits", "--out", "x", "--name", "a/b", "--json"), "SpecError", 1, "cannot name a task"),
        (("inspect", "--json"), "UsageError", 2, "Missing argument"),
        (("inspect", "x", "--nope", "--json"), "UsageError", 2, "--nope"),
        (("fly", "--json"), "UsageError", 2, "No such command 'fly'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_an_error_is_an_object_on_stdout_where_json_is_asked_for(
    run_main: Callable[..., Captured], arguments: tuple[str, ...], kind: str, code: int, message: str
):
    found, out, err = run_main(*arguments)
    error = json.loads(out)["error"]
    assert (found, error["kind"], error["exit_code"]) == (code, kind, code)
    assert message in error["message"]
    if code == 1:
        assert err == f"error: {error['message']}\n"
    else:
        assert "Usage" in err


def test_a_report_on_stdout_stays_the_one_document(run_main: Callable[..., Captured], toy_zoo: Path):
    (toy_zoo / "model.onnx").write_bytes(b"tampered")
    code, out, err = run_main("inspect", toy_zoo, "--json")
    assert code == 1
    assert json.loads(out)["damage"]
    assert err.startswith("error: ")


def test_a_file_called_like_the_option_asks_for_no_json(run_main: Callable[..., Captured]):
    assert_one_line_error(run_main("inspect", "--", "--json"), 1, "--json: does not exist")


def test_a_missing_extra_is_told_in_json_too(run_main: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("vpdeploy.inspection.report.inspect_path", fail)
    code, out, _ = run_main("inspect", "x", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (3, "MissingExtraError")
