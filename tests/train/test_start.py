"""The start of a phase is a candidate like every epoch: judged, stored, and the result where nothing beats it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from train.toys import TOY
from typer.testing import CliRunner

from vpdeploy.cli.main import build_app
from vpdeploy.errors import TrainingError
from vpdeploy_train.evaluation import Evaluation, evaluate_run
from vpdeploy_train.results import TrainingResult, Validation
from vpdeploy_train.run import Run
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow, StateFolder
from vpdeploy_train.training import train_run
from vpdeploy_train.verdict import advise, describe_choice

EPOCHS = 4


class Note:
    """A progress display that notes every epoch and stops after one of a phase."""

    def __init__(self, rows: list[EpochRow], stop: tuple[str, int] | None = None) -> None:
        self.rows, self.stop = rows, stop

    def __enter__(self) -> Note:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def on_batch(self, images: int, *, loss: float, accuracy: float) -> None:
        pass

    def on_epoch(self, row: EpochRow) -> None:
        self.rows.append(row)
        if (row.phase, row.epoch) == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_curves", "plot_pruning"):
        monkeypatch.setattr(f"vpdeploy_train.training.{name}", lambda _, path: path.touch())


@pytest.fixture
def settings(colours: Path, toy_weights: Path) -> TrainSettings:
    return TrainSettings.of(
        data=str(colours),
        backbone=TOY,
        weights=str(toy_weights),
        prompt_tokens=4,
        kv_tokens=2,
        epochs=EPOCHS,
        batch_size=8,
        device="cpu",
        prune=False,
    )


def train(
    settings: TrainSettings, out: Path, *, stop: tuple[str, int] | None = None, **options: Any
) -> tuple[TrainingResult, list[EpochRow]]:
    rows: list[EpochRow] = []
    return train_run(settings, out, name="toy", make_progress=lambda *_: Note(rows, stop), **options), rows


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


Rate = Callable[..., None]


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> Rate:
    """Let validations find so many of ten images right, one number after the other."""

    def set_numbers(*right: int) -> None:
        numbers = iter(right)

        def answer(*_: object) -> Evaluation:
            predicted = (np.arange(10) >= next(numbers)).astype(int)
            return Evaluation(loss=1.0, classes=2, labels=np.zeros(10, int), predicted=predicted)

        monkeypatch.setattr("vpdeploy_train.loop.evaluate", answer)

    return set_numbers


def test_a_training_that_ends_below_its_start_gives_the_start(settings, tmp_path, rate):
    rate(6, 1, 2, 5, 4)
    result, rows = train(settings, tmp_path / "run")
    assert [row.epoch for row in rows] == [0, 1, 2, 3, 4]
    assert result.validation == Validation(accuracy=0.6, loss=1.0)
    assert result.chosen is not None
    assert (result.chosen.phase, result.chosen.epoch, result.chosen.epochs) == ("train", 0, EPOCHS)
    rate(6)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "other", stop=("train", 0))
    start = StateFolder(tmp_path / "other" / "state").read("train")
    assert all(torch.equal(value, start.current[name]) for name, value in result.run.state.items())


def test_a_run_that_a_high_rate_destroys_is_as_good_as_its_probe(settings, tmp_path):
    result, rows = train(replace(settings, lr=1e4, warmup_epochs=0.0), tmp_path / "run")
    assert max(row.val_accuracy for row in rows[1:]) < rows[0].val_accuracy
    again = evaluate_run(Run.read(tmp_path / "run"), split="val", device="cpu").evaluation
    assert again.accuracy == rows[0].val_accuracy == result.run.card.details["metrics"]["val_accuracy"]


def test_the_chosen_epoch_and_its_start_are_named_everywhere(settings, tmp_path, rate):
    rate(6, 5, 8, 7, 8)
    result, _ = train(settings, tmp_path / "run")
    assert describe_choice(result) == (
        "chosen: epoch 2 of 4 (validation accuracy 0.8000; at the start, a linear probe, 0.6000)"
    )
    assert advise(result) is None
    chosen = json.loads((tmp_path / "run" / "task.json").read_text(encoding="utf-8"))["task"]["details"]["chosen"]
    assert chosen["epoch"] == 2
    assert chosen["start"] == {"val_accuracy": 0.6, "val_loss": 1.0}
    assert TrainingResult.read(tmp_path / "run").chosen == result.chosen
    assert result.to_json()["chosen"] == chosen


def test_a_result_no_better_than_its_start_is_told_with_what_to_try(settings, tmp_path, rate):
    rate(6, 1, 2, 5, 6)
    result, _ = train(replace(settings, lr=0.5), tmp_path / "run")
    assert describe_choice(result) == (
        "chosen: the start, a linear probe, before any of its 4 epochs (validation accuracy 0.6000)"
    )
    advice = advise(result)
    assert advice is not None
    for part in ("no better than the start (0.6000 on validation)", "--lr 0.1,", "--lr auto", "more than 4 epochs"):
        assert part in advice


@pytest.mark.parametrize(("right", "advised"), [([10, 1, 1, 1, 1], False), ([6, 6, 6, 6, 6], True)])
def test_where_nothing_could_be_gained_nothing_is_advised(settings, tmp_path, rate, right, advised):
    rate(*right)
    result, _ = train(settings, tmp_path / "run")
    assert (advise(result) is not None) is advised


def test_a_linear_head_that_gains_nothing_is_told_of_prompts(settings, tmp_path, rate):
    rate(6, 6, 5, 4, 4)
    result, _ = train(settings.changed(method="linear"), tmp_path / "run")
    advice = advise(result)
    assert advice is not None
    assert "try a prompt method" in advice
    assert "--lr" not in advice


def test_the_command_line_tells_choice_and_warning(settings, tmp_path, rate):
    rate(6, 1, 2)
    arguments = [f"--data={settings.data}", "--backbone", TOY, f"--weights={settings.weights}", "--no-prune"]
    arguments += ["--epochs=2", "--lr=0.5", "--batch-size=8", f"--out={tmp_path / 'run'}"]
    result = CliRunner().invoke(build_app(["train", *arguments]), ["train", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert "chosen: the start, a linear probe, before any of its 2 epochs" in result.stdout
    assert "warning: the result is no better than the start" in result.stderr
    assert "try --lr 0.1, --lr auto" in result.stderr


def test_history_has_the_start_as_epoch_0_of_every_phase(settings, tmp_path):
    train(replace(settings, prune=True, keep="0.5"), tmp_path / "run")
    rows = history(tmp_path / "run")
    assert [row["phase"] for row in rows if row["epoch"] == "0"] == ["train", "prune-1"]
    assert {rows[0][name] for name in ("lr", "train_loss", "train_accuracy", "images_per_second")} == {"nan"}
    assert 0 <= float(rows[0]["val_accuracy"]) <= 1


def test_a_watcher_is_told_of_trained_epochs_alone(settings, tmp_path):
    told: list[int] = []
    train(settings, tmp_path / "run", watch=lambda row: told.append(row.epoch))
    assert told == [1, 2, 3, 4]


def test_early_stopping_does_not_count_the_start(settings, tmp_path, rate):
    rate(9, 1, 2, 3, 4)
    _, rows = train(replace(settings, early_stop=2), tmp_path / "climbing")
    assert [row.epoch for row in rows] == [0, 1, 2, 3, 4]
    rate(9, 3, 2, 1, 4)
    _, rows = train(replace(settings, early_stop=2), tmp_path / "falling")
    assert [row.epoch for row in rows] == [0, 1, 2, 3]


def test_a_smaller_set_whose_start_is_best_can_be_chosen(settings, tmp_path, rate):
    # The unpruned prompts reach 5 of 10; the smaller set starts at 7 and loses them.
    rate(4, 5, 5, 5, 5, 7, 1, 1, 1, 1)
    asked = replace(settings, prune=True, keep="0.5", prune_search="full")
    result, rows = train(asked, tmp_path / "run")
    assert result.chosen is not None
    assert result.pruning is not None
    assert (result.pruning.chosen, result.chosen.epoch) == ("prune-1", 0)
    assert result.validation == Validation(accuracy=0.7, loss=1.0)
    assert result.pruning.after.val_accuracy == 0.7
    assert rows[5].phase == "prune-1"
    assert describe_choice(result) == (
        "chosen: the start of prune-1, untrained prompts, before any of its 4 epochs (validation accuracy 0.7000)"
    )


def test_a_race_is_run_by_trained_epochs(settings, tmp_path, rate):
    # Two entrants; at a quarter of the epochs one goes on. The first starts better, the second trains better.
    rate(4, 5, 5, 5, 5, *(9, 2), *(3, 6), *(6, 6, 6))
    asked = replace(settings, prune=True, keep="0.5,0.25", prune_search="halving")
    result, _ = train(asked, tmp_path / "run")
    assert result.pruning is not None
    reached = {row.phase: (row.epochs, row.finished) for row in result.pruning.candidates}
    assert reached == {"train": (4, True), "prune-1": (1, False), "prune-2": (4, True)}
    assert result.pruning.chosen == "prune-2"


def test_a_resumed_run_keeps_the_rates_it_began_with(settings, tmp_path, monkeypatch):
    train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", stop=("train", 2))
    # A later version has other defaults.
    monkeypatch.setattr("vpdeploy_train.pace._LEAST_WARMUP_STEPS", 1)
    monkeypatch.setattr(settings.kind, "rates", replace(settings.kind.rates, adamw=7.0))
    train(settings, tmp_path / "run", resume=True)
    for name in ("prompts.safetensors", "task.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = Run.read(tmp_path / "run").card.details["hyperparameters"]
    assert found["lr"] != 7.0


def test_a_state_of_an_earlier_version_is_refused_in_a_line(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", stop=("train", 1))
    path = tmp_path / "run" / "state" / "train.safetensors"
    with safetensors.safe_open(path, framework="pt") as opened:
        fields = json.loads(opened.metadata()["state"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    old = {name: value for name, value in fields.items() if name not in ("pace", "start")}
    path.write_bytes(safetensors.torch.save(tensors, metadata={"state": json.dumps(old)}))
    with pytest.raises(TrainingError, match="an earlier version wrote it") as caught:
        train(settings, tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)
    assert "delete the run and train again" in str(caught.value)


def test_a_run_of_an_earlier_version_is_read_without_a_choice(settings, tmp_path):
    train(settings, tmp_path / "run")
    path = tmp_path / "run" / "task.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["task"]["details"]["chosen"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    result = TrainingResult.read(tmp_path / "run")
    assert result.chosen is None
    assert describe_choice(result) is None
    assert advise(result) is None


def test_without_validation_images_there_is_no_start(settings, tmp_path):
    result, rows = train(replace(settings, data=f"{settings.data}#final"), tmp_path / "run")
    assert [row.epoch for row in rows] == [1, 2, 3, 4]
    assert result.chosen is not None
    assert (result.chosen.epoch, result.chosen.start) == (EPOCHS, None)
    assert [row["epoch"] for row in history(tmp_path / "run")] == ["1", "2", "3", "4"]
