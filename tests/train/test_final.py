"""The final training, which has no validation images, and what a recipe and an interruption leave behind."""

from __future__ import annotations

import csv
import errno
import json
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train.toys import TOY
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app, main
from vpdeploy.cli.signals import Stopped
from vpdeploy.errors import SpecError, TrainingError
from vpdeploy_train.config import read_toml
from vpdeploy_train.evaluation import evaluate_run
from vpdeploy_train.progress import ConsoleProgress
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow, PhaseState, StateFolder
from vpdeploy_train.training import train_run

EPOCHS = 3


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    return TrainSettings.of(
        data=f"{colours}#final",
        backbone=TOY,
        weights=str(toy_weights),
        method="vpt-deep",
        prompt_tokens=2,
        prune=False,
        epochs=EPOCHS,
        batch_size=8,
        device="cpu",
    )


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(["train"]), ["train", *arguments])


@pytest.fixture
def whole(settings, tmp_path) -> Path:
    """A finished run, with its plots."""
    train_run(settings, tmp_path / "whole")
    return tmp_path / "whole"


def test_the_last_epoch_is_the_result_where_nothing_can_be_validated(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("vpdeploy_train.training.plot_curves", lambda _, path: path.touch())
    kept: list[dict[str, torch.Tensor]] = []
    write = StateFolder.write

    def note(self: StateFolder, phase: str, state: PhaseState) -> None:
        kept.append({name: tensor.clone() for name, tensor in state.best.items()})
        write(self, phase, state)

    monkeypatch.setattr(StateFolder, "write", note)
    run = train_run(settings, tmp_path / "run").run
    assert len(kept) == EPOCHS + 2  # at the start, after every epoch, and once more at the end
    assert all((kept[EPOCHS][name] == tensor).all() for name, tensor in run.state.items())
    assert any((kept[0][name] != tensor).any() for name, tensor in run.state.items())


def test_nothing_is_reported_of_a_validation_that_never_was(whole):
    details = Run.read(whole).card.details
    # 42 images less a fifth of each class of 14 for test, rounded.
    assert details["images"] == {"train": 33, "val": 0, "test": 9}
    assert details["metrics"] == {"val_accuracy": None, "val_loss": None}
    with (whole / "history.csv").open(newline="") as stream:
        assert [row["val_accuracy"] for row in csv.DictReader(stream)] == ["nan"] * EPOCHS


def test_an_interrupted_final_training_is_resumed(whole, settings, tmp_path):
    class Stopping(ConsoleProgress):
        def on_epoch(self, row: EpochRow) -> None:
            if row.epoch == 2:
                raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        train_run(settings, part, make_progress=lambda title, images, done: Stopping(title, images=images))
    train_run(settings, part, resume=True)
    assert (part / "prompts.safetensors").read_bytes() == (whole / "prompts.safetensors").read_bytes()


def test_a_final_run_is_evaluated_on_the_test_split_alone(whole):
    result = evaluate_run(Run.read(whole), split="test", device="cpu").evaluation
    assert result.images == 9
    with pytest.raises(SpecError, match=r"no split 'val'; the splits with images are train, test"):
        evaluate_run(Run.read(whole), split="val", device="cpu")


def test_pruning_without_validation_images_is_refused_before_anything_is_written(settings, tmp_path):
    with pytest.raises(SpecError, match="no validation images to choose by; use --no-prune"):
        train_run(replace(settings, prune=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_that_nothing_was_validated(settings, tmp_path):
    arguments = [f"--data={settings.data}", "--backbone", TOY, f"--weights={settings.weights}", "--no-prune"]
    result = invoke(f"--out={tmp_path / 'run'}", *arguments, "--epochs=1", "--device=cpu")
    assert result.exit_code == 0, result.output
    assert "no validation images: the last epoch is the result" in result.stdout
    result = invoke(f"--out={tmp_path / 'j'}", *arguments, "--epochs=1", "--device=cpu", "--json")
    assert json.loads(result.stdout)["metrics"] == {"val_accuracy": None, "val_loss": None}


def test_what_a_recipe_gave_is_written_down(colours, toy_weights, tmp_path):
    given = [f"--data={colours}", "--backbone", TOY, f"--weights={toy_weights}", "--epochs=1", "--image-size=16"]
    result = invoke(f"--out={tmp_path / 'run'}", "--recipe=fgvc/cub", *given, "--no-prune", "--device=cpu")
    assert result.exit_code == 0, result.output
    stored = read_toml(tmp_path / "run" / "args.toml")
    expected = {"recipe": "fgvc/cub", "crop_ratio": 0.875, "augment": "crop-flip", "optimizer": "sgd", "epochs": 1}
    assert {name: stored[name] for name in expected} == expected
    preprocessing = Run.read(tmp_path / "run").card.preprocessing
    assert (preprocessing.crop_ratio, preprocessing.mean) == (0.875, (0.485, 0.456, 0.406))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
def test_sigterm_ends_a_training_with_the_hint(tmp_path, monkeypatch, capsys):
    def stop(settings: TrainSettings, out: Path, **_: object) -> None:
        out.mkdir()
        (out / "args.toml").write_text(settings.to_toml())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("vpdeploy_train.training.train_run", stop)
    monkeypatch.setattr(sys, "argv", ["vpdeploy", "train", f"--out={tmp_path / 'run'}", "--data=digits"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 143
    assert f"continue with: vpdeploy train --out {tmp_path / 'run'} --resume" in capsys.readouterr().err


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_is_told_with_how_to_go_on(tmp_path, monkeypatch, begun):
    out = tmp_path / "run"

    def fill(settings: TrainSettings, out: Path, **_: object) -> None:
        if begun:
            out.mkdir()
            (out / "args.toml").write_text(settings.to_toml())
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "task.json"))

    monkeypatch.setattr("vpdeploy_train.training.train_run", fill)
    error = invoke(f"--out={out}", "--data=digits").exception
    if begun:
        command = f"vpdeploy train --out {out} --resume"
        assert str(error) == f"{out / 'task.json'}: the disk is full; make room and continue with: {command}"
        assert isinstance(error, TrainingError)
    else:
        assert isinstance(error, OSError)  # of which the command line says to run it again


@pytest.mark.parametrize(("begun", "advice"), [(False, "nothing to resume"), (True, "continue with: vpdeploy train")])
def test_what_is_said_after_an_interruption_is_true(tmp_path, monkeypatch, begun, advice):
    def stop(settings: TrainSettings, out: Path, **_: object) -> None:
        if begun:
            out.mkdir()
            (out / "args.toml").write_text(settings.to_toml())
        raise KeyboardInterrupt

    monkeypatch.setattr("vpdeploy_train.training.train_run", stop)
    out = tmp_path / "my run's"
    result = invoke(f"--out={out}", "--data=digits", "--name=numbers", "--threads=1")
    assert isinstance(result.exception, Stopped)
    told = str(result.exception)
    assert advice in told
    command = told.partition("continue with: ")[2]
    expected = ["vpdeploy", "train", "--out", str(out), "--resume", "--threads", "1"] if begun else []
    assert shlex.split(command) == expected
