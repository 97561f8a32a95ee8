"""Who works on which trial: claims that end with their worker, and trials whose worker is gone."""

from __future__ import annotations

import contextlib
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from vpdeploy.files import locked

logger = logging.getLogger("vpdeploy.train")

TRIALS_FOLDER = "trials"
_HOME, _CONTINUES = "home", "continues"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process works on.

    Attributes:
        trial: The trial.
        folder: Its run folder.
        lock: Holds the trial's lock file for as long as the process works on the trial.
    """

    trial: Trial
    folder: Path
    lock: contextlib.ExitStack

    def release(self) -> None:
        """End the claim."""
        self.lock.close()


def claim(trial: Trial, out: Path) -> Claim:
    """Claim a trial; the folder of the one that it repeats becomes its own, so that the run there is continued.

    Args:
        trial: A trial that has just begun.
        out: The sweep's folder.
    """
    # The lock is the claim: the operating system frees it with the process, however that ends.
    folder = trial_folder(out, trial.number)
    lock = contextlib.ExitStack()
    lock.enter_context(locked(_lock_of(out, trial.number)))
    trial.set_user_attr(_HOME, _home(out))

    # A repeated trial takes over the folder of the one that was interrupted, and resumes its run.
    before = trial.user_attrs.get(_CONTINUES)
    if before is not None and trial_folder(out, before).is_dir() and not folder.exists():
        trial_folder(out, before).rename(folder)
    return Claim(trial=trial, folder=folder, lock=lock)


def reclaim(study: Study, out: Path, *, is_local: bool) -> None:
    """Mark trials as failed whose worker is gone, and let them be repeated.

    Workers of other folders and machines cannot be asked whether they live; their trials are left alone.

    Args:
        study: The study.
        out: The sweep's folder, whose lock this process holds.
        is_local: All workers of the study work in this folder.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not is_local and not is_here(trial, out):
            continue
        # Where another holds the lock, the worker lives.
        with contextlib.suppress(BlockingIOError), locked(_lock_of(out, trial.number), wait=False):
            # Its worker may have told the result and let go since the states were read.
            if study.get_trials(deepcopy=False)[trial.number].state is not TrialState.RUNNING:
                continue
            logger.info("trial %d was interrupted; it is continued", trial.number)
            give_up(study, trial)


def give_up(study: Study, trial: FrozenTrial) -> None:
    """Mark a trial as failed and let its values be tried again."""
    study.tell(trial.number, state=TrialState.FAIL)
    if trial.params:
        study.enqueue_trial(trial.params, user_attrs={_CONTINUES: trial.number})


def trial_folder(out: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return out / TRIALS_FOLDER / f"{number:04}"


def is_here(trial: FrozenTrial, out: Path) -> bool:
    """Tell whether a trial's run lies in this folder."""
    return bool(trial.user_attrs.get(_HOME) == _home(out))


def _home(out: Path) -> str:
    return f"{socket.gethostname()}:{out.resolve()}"


def _lock_of(out: Path, number: int) -> Path:
    return out / TRIALS_FOLDER / f"{number:04}.lock"
