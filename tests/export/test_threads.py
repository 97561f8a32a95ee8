"""``--threads`` of the verbs that compute with torch, and of the ONNX Runtime sessions that they open."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from exports import export_folded
from parity_files import path_of
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.errors import SpecError
from vpdeploy_export.conversion import convert as convert_bundle
from vpdeploy_export.targets.target import TargetOptions
from vpdeploy_export.verification import verify
from vpdeploy_train.device import use_threads

VERBS = {
    "train": ("train", "--data", "digits", "--out", "out"),
    "sweep": ("sweep", "--data", "digits", "--out", "out"),
    "eval": ("eval", "RUN"),
    "import": ("import", "CHECKPOINT", "--format", "e2vpt", "--out", "out"),
    "export": ("export", "RUN", "--out", "x.onnx"),
    "verify": ("verify", "ZOO"),
    "convert": ("convert", "ZOO", "--to", "triton", "--out", "out"),
    "task add": ("task", "add", "ZOO", "RUN"),
    "quickstart": ("quickstart",),
}
"""Of each verb, arguments with which it begins to compute; words in capitals stand for files."""


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the numbers that torch is given, and leave this process at its own."""
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


@pytest.mark.parametrize("verb", VERBS)
def test_the_verbs_threads_are_torchs(
    verb: str, tiny_run_paths: dict[str, Path], zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        raise SpecError(f"torch was given {number}")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    monkeypatch.chdir(tmp_path)
    files = {"RUN": tiny_run_paths["flowers"], "ZOO": zoo, "CHECKPOINT": path_of("e2vpt_toy")}
    arguments = [str(files.get(word, word)) for word in VERBS[verb]]
    result = CliRunner().invoke(build_app(), [*arguments, "--threads", "3"])
    assert str(result.exception) == "torch was given 3", result.output


def test_torch_chooses_where_no_threads_are_asked_for(chosen: list[int]) -> None:
    use_threads(None)
    assert chosen == []
    use_threads(2)
    assert chosen == [2]


@pytest.mark.parametrize("threads", ["0", str(2**40)])
@pytest.mark.parametrize("verb", VERBS)
def test_no_threads_and_more_than_a_machine_has_are_a_usage_error(verb: str, threads: str, chosen: list[int]) -> None:
    result = CliRunner().invoke(build_app(), [*VERBS[verb], "--threads", threads])
    assert result.exit_code == 2
    assert "--threads" in result.output
    assert chosen == []


@pytest.fixture
def sessions_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have torch say that it uses three threads, and note the numbers of ONNX Runtime's sessions."""
    numbers: list[int] = []
    session = onnxruntime.InferenceSession

    def open_session(path: str, options: Any, **settings: Any) -> Any:
        numbers.append(options.intra_op_num_threads)
        return session(path, options, **settings)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return numbers


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_parity_gate_of_an_export_runs_on_torchs_threads(
    sessions_threads: list[int],
    traced: Callable[..., None],
    tiny_run_paths: dict[str, Path],
    half_folded: Any,
    tmp_path: Path,
    precision: Any,
) -> None:
    if precision == "fp32":
        export_folded(tiny_run_paths["flowers"], tmp_path / "x.onnx")
    else:
        verify(half_folded.path, runtimes=["onnxruntime-cpu", "emulated"], bisects=True)
    assert set(sessions_threads) == {3}


def test_a_conversion_is_compared_on_torchs_threads(sessions_threads: list[int], zoo: Path, tmp_path: Path) -> None:
    convert_bundle(zoo, tmp_path / "out", target="onnx-adapter", options=TargetOptions())
    assert len(sessions_threads) >= 2
    assert set(sessions_threads) == {3}


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
def test_openmp_hears_that_waiting_threads_sleep(tiny_run_paths: dict[str, Path]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "vpdeploy", "eval", str(tiny_run_paths["flowers"])],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
    )
    assert "'/nowhere/images' is not there" in done.stderr  # known once torch is loaded
    assert "GOMP_SPINCOUNT = '0'" in done.stderr  # 300000 where nothing is said
