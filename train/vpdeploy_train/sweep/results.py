"""What a sweep leaves in its folder: a table of trials, pictures, and the best run with its settings."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from vpdeploy.files import replacing_folder, write_atomically
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.sweep.claims import is_here, trial_folder
from vpdeploy_train.sweep.outcome import TrialOutcome
from vpdeploy_train.sweep.pictures import plot_study
from vpdeploy_train.sweep.space import with_values
from vpdeploy_train.sweep.study import ERROR, best_trial
from vpdeploy_train.workbench import STATE_FOLDER

BEST_FOLDER, BEST_SETTINGS, TABLE = "best", "best.toml", "trials.csv"
_MARK = "trial.txt"


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Where a sweep stands.

    Attributes:
        out: The sweep's folder.
        states: Number of trials by state: complete, pruned, running, fail, waiting.
        best: Number of the best trial; None where none is complete.
        val_accuracy: The best trial's validation accuracy; None where no trial is complete.
        values: What was varied, as the best trial has it.
        best_run: The best trial's run; None where it lies on another machine.
    """

    out: Path
    states: dict[str, int]
    best: int | None
    val_accuracy: float | None
    values: dict[str, Any]
    best_run: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, as ``vpdeploy sweep --json`` prints it."""
        return {
            "sweep": str(self.out),
            "trials": self.states,
            "best": None if self.best is None else {"trial": self.best, "val_accuracy": self.val_accuracy},
            "values": self.values,
            "run": None if self.best_run is None else str(self.best_run),
            "settings": None if self.best is None else str(self.out / BEST_SETTINGS),
        }


def publish(study: Study, out: Path, settings: TrainSettings) -> SweepResult:
    """Write the table, the pictures, and the best trial's run and settings as the study stands.

    Args:
        study: The study.
        out: The sweep's folder, whose lock this process holds.
        settings: What all trials have in common.
    """
    # The table of all trials.
    trials = study.get_trials(deepcopy=False)
    states = {state.name.lower(): 0 for state in TrialState}
    for trial in trials:
        states[trial.state.name.lower()] += 1
    states = {name: count for name, count in states.items() if count}
    write_atomically(out / TABLE, _table(trials).encode())

    # The best trial: its settings, its run where it lies in this folder, and the pictures.
    best = best_trial(study)
    if best is None:
        return SweepResult(out=out, states=states, best=None, val_accuracy=None, values={}, best_run=None)
    text = with_values(settings, best.params).to_toml()
    write_atomically(out / BEST_SETTINGS, text.encode())
    run = _copy_best(best, out) if is_here(best, out) else None
    plot_study(study, best, out)

    return SweepResult(
        out=out, states=states, best=best.number, val_accuracy=best.value, values=dict(best.params), best_run=run
    )


def _copy_best(best: FrozenTrial, out: Path) -> Path:
    """Bring the best trial's run, without what resuming needs, to a place of its own."""
    target = out / BEST_FOLDER
    mark = target / _MARK
    if mark.is_file() and mark.read_text(encoding="utf-8") == str(best.number):
        return target
    with replacing_folder(target) as folder:
        ignore = shutil.ignore_patterns(STATE_FOLDER)
        shutil.copytree(trial_folder(out, best.number), folder, ignore=ignore, dirs_exist_ok=True)
        (folder / _MARK).write_text(str(best.number), encoding="utf-8")
    return target


def _table(trials: list[FrozenTrial]) -> str:
    names = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO()
    columns = ["trial", "state", "epochs", "val_accuracy", "val_loss", "parameters", "bytes", *names, "error"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for trial in trials:
        outcome = TrialOutcome.stored(trial)
        writer.writerow(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "epochs": len(trial.intermediate_values),
                **({} if outcome is None else outcome.to_json()),
                "error": trial.user_attrs.get(ERROR, ""),
                **trial.params,
            }
        )
    return text.getvalue()
