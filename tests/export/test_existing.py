"""What becomes of a bundle or a model that is there already when an export is written to its place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from core import toy
from exports import export_bundle, export_folded

from vpdeploy import load
from vpdeploy.cli.main import main
from vpdeploy.errors import BundleCorruptError, BundleError, LayoutMismatchError, ParityError, SpecError
from vpdeploy.format.bundle import Bundle, publish_task, replace_bundle
from vpdeploy.format.folded import FoldedCard
from vpdeploy_export import export
from vpdeploy_train.run import Run

Command = Callable[..., tuple[int, str, str]]


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


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


@pytest.fixture(scope="module")
def fish(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A run that the bundle of the tests does not hold."""
    kept = tiny_runs.ragged_kept([[0], [1, 2], []], [[0], [], [5]])
    return tiny_runs.write_run(
        tmp_path_factory.mktemp("more") / "fish", tiny_weights, name="fish", classes=9, kept=kept, seed=50
    ).path


# --- refusing ---


def test_an_export_over_a_bundle_is_refused_before_torch_is_imported(zoo_copy: Path, tiny_run_paths: dict[str, Path]):
    program = (
        "import sys\n"
        "from vpdeploy.cli.main import main\n"
        "sys.argv = ['vpdeploy', 'export', sys.argv[1], '--out', sys.argv[2]]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    before = toy.snapshot(zoo_copy)
    found = subprocess.run(
        [sys.executable, "-c", program, tiny_run_paths["flowers"], zoo_copy], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "False\n", 1)
    assert "would drop tasks birds, probe and the versions so far of flowers (1); give --update" in found.stderr
    assert toy.snapshot(zoo_copy) == before


def test_the_python_call_refuses_as_the_command_does(zoo_copy: Path, tiny_run_paths: dict[str, Path]):
    before = toy.snapshot(zoo_copy)
    with pytest.raises(BundleError, match="would drop the versions so far of flowers"):
        export_bundle(list(tiny_run_paths.values()), zoo_copy)
    assert toy.snapshot(zoo_copy) == before


def test_update_and_replace_exclude_each_other(command: Command, zoo_copy: Path, tiny_run_paths: dict[str, Path]):
    code, _, err = command("export", tiny_run_paths["birds"], "--out", zoo_copy, "--update", "--replace")
    assert (code, "give one of them" in err) == (1, True)


def test_a_bundle_that_came_while_another_was_made_is_not_replaced(
    zoo_copy: Path,
    tmp_path: Path,
    tiny_run_paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    shared_traces: Path,
):
    out = tmp_path / "new"
    real = export.run_gate

    def be_overtaken(*arguments: object) -> object:
        shutil.copytree(zoo_copy, out)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "run_gate", be_overtaken)
    with pytest.raises(BundleError, match="another export has written a bundle there"):
        export_bundle([tiny_run_paths["birds"]], out)
    assert toy.snapshot(out) == toy.snapshot(zoo_copy)


# --- updating ---


def test_an_update_keeps_the_graph_the_other_tasks_and_all_versions(
    command: Command, zoo_copy: Path, fish: Path, tiny_run_paths: dict[str, Path]
):
    publish_task(zoo_copy, Bundle.open(zoo_copy).read_task("birds"))
    before = toy.snapshot(zoo_copy)
    code, out, err = command("export", fish, tiny_run_paths["flowers"], "--out", zoo_copy, "--update")
    assert (code, err) == (0, "")
    assert "fish: version 1, " in out
    assert "flowers: version 2, " in out
    bundle = Bundle.open(zoo_copy)
    assert bundle.versions == {"flowers": 2, "birds": 2, "probe": 1, "fish": 1}
    assert sorted(bundle.manifest.tasks["flowers"].files) == [1, 2]
    now = toy.snapshot(zoo_copy)
    assert {name: now[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    with load(zoo_copy, threads=1) as session:
        assert session.tasks == ("flowers", "birds", "probe", "fish")
        assert len(session.predict(np.zeros((32, 32, 3), np.uint8), "fish", top=9)[0].ranking) == 9
    assert bundle.read_task("fish").card.details["parity"]["images"] > 0


def test_the_python_call_says_which_versions_are_served(zoo_copy: Path, fish: Path):
    report = export_bundle([fish], zoo_copy, existing="update")
    assert (report.versions, report.precision, report.opset) == ({"fish": 1}, "fp32", 20)
    assert json.loads(json.dumps(report.to_fields()))["versions"] == {"fish": 1}


def test_an_update_follows_the_precision_and_opset_of_the_bundle(
    tmp_path: Path, half_zoo: export.ExportReport, fish: Path
):
    zoo = Path(shutil.copytree(half_zoo.path, tmp_path / "half"))
    assert export_bundle([fish], zoo, existing="update").precision == "fp16"
    assert export_bundle([fish], zoo, existing="update", precision="fp16", opset=20).versions == {"fish": 2}
    with pytest.raises(SpecError, match="its graph has precision fp16, and fp32 was asked for"):
        export_bundle([fish], zoo, existing="update", precision="fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fp16"], "its graph has precision fp32, and fp16 was asked for; an update keeps the graph"),
        (["--opset", "23"], "its graph has opset 20, and 23 was asked for"),
        (["--layout", "superset"], "its graph has layout prefix, and superset was asked for"),
    ],
)
def test_an_update_to_another_graph_is_refused_in_one_line(
    command: Command, zoo_copy: Path, fish: Path, options: list[str], message: str
):
    before = toy.snapshot(zoo_copy)
    code, out, err = command("export", fish, "--out", zoo_copy, "--update", *options)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert "--replace" in err
    assert toy.snapshot(zoo_copy) == before


def test_prompts_that_the_graph_has_no_place_for_are_refused_by_name(tmp_path: Path, shared_traces: Path):
    plain, adaptive, _ = tiny_runs.write_mixed_runs(tmp_path)
    zoo = export_bundle([plain], tmp_path / "zoo").path
    before = toy.snapshot(zoo)
    with pytest.raises(
        LayoutMismatchError, match=r"task 'vapt' .*prefix layout has no place for; .*--replace --layout"
    ):
        export_bundle([plain, adaptive], zoo, existing="update")
    assert toy.snapshot(zoo) == before


def test_an_update_of_several_tasks_is_all_or_nothing(
    zoo_copy: Path, fish: Path, tiny_run_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    before = toy.snapshot(zoo_copy)
    real = export.run_gate

    def fail_the_last(*arguments: object) -> object:
        first, last = real(*arguments)  # type: ignore[arg-type]
        object.__setattr__(last, "max_abs_difference", 1e9)
        return [first, last]

    with monkeypatch.context() as patched:
        patched.setattr(export, "run_gate", fail_the_last)
        with pytest.raises(ParityError):
            export_bundle([fish, tiny_run_paths["flowers"]], zoo_copy, existing="update")
    assert toy.snapshot(zoo_copy) == before


def test_a_graph_that_was_replaced_while_a_task_was_compared_takes_no_task(
    zoo_copy: Path, fish: Path, monkeypatch: pytest.MonkeyPatch
):
    real = export.run_gate

    def be_overtaken(*arguments: object) -> object:
        reports = real(*arguments)  # type: ignore[arg-type]
        old = Bundle.open(zoo_copy)
        (zoo_copy.parent / "staged.onnx").write_bytes(b"another graph")
        replace_bundle(zoo_copy, old.manifest, [old.read_task("birds")], zoo_copy.parent / "staged.onnx")
        return reports

    monkeypatch.setattr(export, "run_gate", be_overtaken)
    with pytest.raises(BundleError, match="its graph was replaced meanwhile, nothing was added; run the command again"):
        export_bundle([fish], zoo_copy, existing="update")
    assert Bundle.open(zoo_copy).tasks == ("birds",)


def test_a_task_of_the_same_name_with_other_classes_is_published_with_a_warning(
    command: Command, zoo_copy: Path, tmp_path: Path, tiny_weights: Path
):
    tiny_runs.write_run(tmp_path / "other", tiny_weights, name="birds", classes=3, kept=None, method="linear", seed=7)
    code, out, err = command("task", "add", zoo_copy, tmp_path / "other", "--json")
    assert (code, err.count("\n")) == (0, 1)
    assert "task 'birds' has other classes than before (7, now 3)" in err
    assert f"vpdeploy task rollback {zoo_copy} birds" in err
    added = json.loads(out)
    assert (added["task"], added["version"], added["parity"]["images"] > 0) == ("birds", 2, True)
    with load(zoo_copy, threads=1) as session:
        assert len(session.card("birds").labels) == 3
    assert command("task", "rollback", zoo_copy, "birds")[0] == 0
    with load(zoo_copy, threads=1) as session:
        assert len(session.card("birds").labels) == 7


# --- replacing ---


def test_replace_says_what_is_there_from_now_on(command: Command, zoo_copy: Path, fish: Path):
    with load(zoo_copy, threads=1) as session:
        assert command("export", fish, "--out", zoo_copy, "--replace")[0] == 0
        assert (session.sync().removed, session.tasks) == (("flowers", "birds", "probe"), ("fish",))
    assert Bundle.open(zoo_copy).tasks == ("fish",)


def test_replace_writes_a_bundle_where_there_is_none(tmp_path: Path, fish: Path, shared_traces: Path):
    assert export_bundle([fish], tmp_path / "zoo", existing="replace").parity[0].passed


def test_a_folded_model_of_the_same_task_is_replaced_and_of_another_only_when_told(
    command: Command, tmp_path: Path, folded_flowers: Path, tiny_run_paths: dict[str, Path]
):
    out = Path(shutil.copy(folded_flowers, tmp_path / "task.onnx"))
    assert command("export", tiny_run_paths["flowers"], "--out", out)[0] == 0
    code, _, err = command("export", tiny_run_paths["birds"], "--out", out)
    assert (code, "holds task 'flowers', not task 'birds'" in err) == (1, True)
    assert FoldedCard.read(out).task.name == "flowers"
    assert command("export", tiny_run_paths["birds"], "--out", out, "--replace")[0] == 0
    assert FoldedCard.read(out).task.name == "birds"


def test_a_foreign_file_is_not_replaced(command: Command, tmp_path: Path, tiny_run_paths: dict[str, Path]):
    (tmp_path / "mine.onnx").write_bytes(b"precious")
    for options in ([], ["--replace"]):
        code, _, err = command("export", tiny_run_paths["flowers"], "--out", tmp_path / "mine.onnx", *options)
        assert (code, "was not written by vpdeploy export" in err) == (1, True)
    assert (tmp_path / "mine.onnx").read_bytes() == b"precious"


# --- links ---


def test_exports_are_written_through_links(tmp_path: Path, tiny_run_paths: dict[str, Path], shared_traces: Path):
    (tmp_path / "real").mkdir()
    for name in ("zoo", "task.onnx"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    export_folded(tiny_run_paths["flowers"], tmp_path / "task.onnx")
    export_bundle([tiny_run_paths["flowers"]], tmp_path / "zoo")
    export_folded(tiny_run_paths["flowers"], tmp_path / "task.onnx")
    export_bundle([tiny_run_paths["birds"]], tmp_path / "zoo", existing="replace")
    assert (tmp_path / "zoo").is_symlink()
    assert (tmp_path / "task.onnx").is_symlink()
    assert FoldedCard.read(tmp_path / "real" / "task.onnx").task.name == "flowers"
    assert Bundle.open(tmp_path / "real" / "zoo").tasks == ("birds",)
    assert names(tmp_path) == ["real", "task.onnx", "zoo"]
    assert names(tmp_path / "real") == ["task.onnx", "zoo"]


# --- the run's own files ---


def test_a_flipped_byte_in_a_run_is_refused(tmp_path: Path, tiny_run_paths: dict[str, Path]):
    run = Path(shutil.copytree(tiny_run_paths["flowers"], tmp_path / "run"))
    content = bytearray((run / "prompts.safetensors").read_bytes())
    content[-3] ^= 1
    (run / "prompts.safetensors").write_bytes(content)
    with pytest.raises(BundleCorruptError, match=r"prompts\.safetensors: contents do not match the sha256 in task"):
        export_folded(run, tmp_path / "x.onnx")
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("step", ["before the prompts", "between the two"])
def test_a_run_that_is_rewritten_is_never_left_contradicting_itself(
    tmp_path: Path, tiny_run_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, step: str
):
    class Killed(BaseException):
        pass

    run = Path(shutil.copytree(tiny_run_paths["flowers"], tmp_path / "run"))
    other = Run.read(tiny_run_paths["birds"])
    object.__setattr__(other, "path", run)
    (run / "args.toml").touch()  # what a training can be continued by
    real = Path.replace

    def die(source: Path, target: Path) -> Path:
        if target.name == ("prompts.safetensors" if step == "before the prompts" else "task.json"):
            raise Killed
        return real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            other.write()
    with pytest.raises(BundleError, match=r"not a finished run.*finish it with: vpdeploy train --out .* --resume"):
        Run.read(run)
    other.write()
    assert Run.read(run).card.name == "birds"


def test_a_run_that_is_written_again_unchanged_is_readable_all_the_while(
    tmp_path: Path, tiny_run_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    run = Run.read(Path(shutil.copytree(tiny_run_paths["flowers"], tmp_path / "run")))
    real, readable = Path.replace, []

    def look(source: Path, target: Path) -> Path:
        readable.append(Run.read(run.path).card.name)
        return real(source, target)

    monkeypatch.setattr(Path, "replace", look)
    run.write()
    assert readable == ["flowers", "flowers"]
