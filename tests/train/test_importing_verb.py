"""The verb ``import``, and what is left when it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_files import path_of, read_state
from train.imports import (
    LINEAR,
    importing,
)

from vpdeploy.cli.main import main
from vpdeploy_train.run import Run


def run_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["vpdeploy", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return (stopped.value.code, *capsys.readouterr())


def test_the_verb_prints_a_summary(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "my-run"
    options = ["--format", "e2vpt", "--out", out, "--std", "0.5", "0.5", "0.5", "--resize", "squash", "--json"]
    code, text, _ = run_verb(monkeypatch, capsys, path_of("e2vpt_toy"), *options)
    assert code == 0
    summary = json.loads(text)
    assert (summary["task"], summary["method"], summary["classes"]) == ("my-run", "e2vpt", 7)
    assert (summary["backbone"]["heads"], summary["weights"]) == (3, "backbone.safetensors")
    assert summary["preprocessing"]["std"] == [0.5, 0.5, 0.5]
    assert Run.read(out).card.preprocessing.resize == "squash"


def test_the_verb_says_what_to_do_next_and_what_it_assumed(tmp_path: Path, monkeypatch, capsys):
    arguments = (path_of("vpt_shallow_toy"), "--format", "vpt", "--heads", 3, "--out", tmp_path / "out", "--name", "t")
    code, text, notes = run_verb(monkeypatch, capsys, *arguments)
    assert code == 0
    assert f"next: vpdeploy export {tmp_path / 'out'} --out t.onnx" in text
    assert 'no class names, so they are "0" to "6"' in notes


def test_what_the_verb_refuses_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys):
    arguments = (path_of("vpt_deep_toy"), "--format", "vapt", "--heads", 3, "--out", tmp_path / "out")
    code, text, error = run_verb(monkeypatch, capsys, *arguments)
    assert (code, text) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch):
    def fail(self: Run) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "write", fail)
    with pytest.raises(OSError, match="No space"):
        importing(path_of("vpt_deep_toy"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_reference_values_are_not_changed_by_reading(tmp_path: Path):
    run = importing(path_of("vapt_toy"), tmp_path / "out", format="vapt")
    state = read_state("vapt_toy")
    assert np.array_equal(run.state["method.linear_weight.1"].numpy(), state[LINEAR].numpy())
    assert run.structure["eps"] == 1e-5
