"""The study of a sweep: Optuna's record of its trials, on disk or in a database."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from vpdeploy.errors import SpecError
from vpdeploy.files import locked, write_atomically
from vpdeploy.toml import parse_toml
from vpdeploy_train.config import SharedSettings
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.sweep.outcome import TrialOutcome
from vpdeploy_train.sweep.space import Choices, Space, applies, to_fields

Pruner = Literal["median", "asha", "none"]

STUDY_FILE = "study.db"
LOCK_FILE = "study.lock"
NAME_FILE = "study.txt"
ERROR = "error"
"""Attribute of a trial that failed for a reason that would come again."""

_STARTUP_TRIALS = 5
_BUSY_SECONDS = 120


@contextlib.contextmanager
def opened_study(
    out: Path, *, url: str | None, name: str, settings: TrainSettings, space: Space, pruner: Pruner
) -> Iterator[Study]:
    """Open a study, or begin it.

    The default storage is an SQLite file: it is transactional, so a worker that is killed while it writes damages
    nothing, and several processes of one machine can share it. Several machines share a database server by its URL.

    Args:
        out: The sweep's folder.
        url: The storage as SQLAlchemy names it; None takes ``study.db`` in the folder.
        name: The study's name in the storage.
        settings: What all trials have in common.
        space: What they vary.
        pruner: How unpromising trials are found.

    Raises:
        SpecError: The storage cannot be used, or the study is one of other settings.
    """
    # A folder belongs to one study; SQLite's file waits for its writers, a server's connections may have gone.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    local = url is None or url.startswith("sqlite")
    options = {"connect_args": {"timeout": _BUSY_SECONDS}} if local else {"pool_pre_ping": True}
    _check_folder(out, name)

    # Open the study or begin it, and compare what it is about.
    try:
        with locked(out / LOCK_FILE):  # two processes must not create the tables at once
            storage = RDBStorage(url or f"sqlite:///{(out / STUDY_FILE).resolve()}", engine_kwargs=options)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                load_if_exists=True,
                direction="maximize",
                pruner=make_pruner(pruner, epochs=settings.epochs),
            )
            _check_same(study, settings, space)
    except SpecError:
        raise
    except Exception as error:  # SQLAlchemy's, the driver's, a missing driver
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(f"--storage {url or out / STUDY_FILE}: cannot be used: {reason}") from error

    try:
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def make_pruner(name: Pruner, *, epochs: int) -> BasePruner:
    """Return what decides, from validation accuracy by epoch, which trials are stopped.

    ``median``: those below the median of the earlier trials at the same epoch, after a quarter of the epochs;
    ``asha``: all but the best third at 1/9, 1/3, ... of the epochs (asynchronous successive halving, arXiv 1810.05934).
    """
    if name == "median":
        return MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=max(1, epochs // 4))
    if name == "asha":
        return SuccessiveHalvingPruner(min_resource=max(1, epochs // 9), reduction_factor=3)
    return NopPruner()


def ask(study: Study, *, seed: int) -> Trial:
    """Begin a trial: one that waits to be repeated, else a new one.

    What is drawn depends on the seed and the number of trials so far, so a sweep that is continued does not draw what
    it drew before, and one worker's sweep can be repeated.
    """
    drawn = seed * 1_000_003 + len(study.trials)
    study.sampler = TPESampler(seed=drawn % 2**32, n_startup_trials=_STARTUP_TRIALS)
    return study.ask()


def draw(trial: Trial, space: Space, *, method: str) -> dict[str, Any]:
    """Return a trial's values; settings that its method does not know are not drawn.

    Args:
        trial: The trial.
        space: What is varied.
        method: The method, where the space does not vary it.
    """
    values: dict[str, Any] = {}
    for name in sorted(space, key=lambda name: name != "method"):
        if not applies(name, str(values.get("method", method))):
            continue
        dimension = space[name]
        if isinstance(dimension, Choices):
            values[name] = trial.suggest_categorical(name, dimension.values)
        elif dimension.whole:
            values[name] = trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            values[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return values


def counts(trial: FrozenTrial) -> bool:
    """Tell whether a trial is one of those that were asked for: done, under way, or failed for good."""
    if trial.state is TrialState.FAIL:
        return ERROR in trial.user_attrs
    return trial.state is not TrialState.WAITING


def best_trial(study: Study) -> FrozenTrial | None:
    """Return the trial that is best on validation: by accuracy, then loss, then the smaller prompt set."""
    outcomes = [(TrialOutcome.stored(trial), trial) for trial in study.get_trials(deepcopy=False)]
    done = [(outcome.rank, -trial.number, trial) for outcome, trial in outcomes if outcome is not None]
    return max(done, key=lambda each: each[:2])[2] if done else None


def _check_folder(out: Path, name: str) -> None:
    """Note which study the folder's trials belong to, or compare it."""
    note = out / NAME_FILE
    if not note.is_file():
        write_atomically(note, name.encode())
    elif (found := note.read_text(encoding="utf-8")) != name:
        raise SpecError(f"{out}: holds the trials of study '{found}', not of '{name}'; use another --out")


def _check_same(study: Study, settings: TrainSettings, space: Space) -> None:
    """Note what the study is about, or compare it."""
    advice = "use another --out, and in a shared storage another --study"
    about = {"settings": settings.to_toml(), "space": json.dumps(to_fields(space), sort_keys=True)}
    for key, text in about.items():
        before = study.user_attrs.get(key)
        if before is None or not any(map(counts, study.get_trials(deepcopy=False))):
            study.set_user_attr(key, text)
        elif before != text and not (key == "settings" and _same_settings(before, settings)):
            changed = _first_difference(before, text) if key == "settings" else f"space was {before}, now {text}"
            raise SpecError(f"study '{study.study_name}' cannot go on with other settings: {changed}; {advice}")


def _same_settings(before: str, now: TrainSettings) -> bool:
    """Tell whether a stored text means the same settings, however an earlier version wrote them down."""
    try:
        return TrainSettings.merge(SharedSettings(parse_toml(before))).difference(now) is None
    except (SpecError, ValueError):
        return False


def _first_difference(before: str, now: str) -> str:
    old, new = before.splitlines(), now.splitlines()
    gone = [line for line in old if line not in new]
    come = [line for line in new if line not in old]
    return f"was {', '.join(gone) or 'not given'}, now {', '.join(come) or 'not given'}"
