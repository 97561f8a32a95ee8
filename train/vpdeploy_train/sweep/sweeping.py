"""A sweep: trials on one study until enough are there, each a training run of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from optuna import TrialPruned
from optuna.study import Study
from optuna.trial import Trial, TrialState

from vpdeploy.errors import SpecError, TrainingError, VpdeployError
from vpdeploy.files import locked
from vpdeploy.format.run import ARGS_FILE
from vpdeploy_train.inputs import TrainingInputs, load_inputs
from vpdeploy_train.phases import FIRST_PHASE
from vpdeploy_train.settings import TrainSettings
from vpdeploy_train.state import EpochRow
from vpdeploy_train.sweep.claims import Claim, claim, give_up, reclaim
from vpdeploy_train.sweep.outcome import TrialOutcome
from vpdeploy_train.sweep.results import SweepResult, publish
from vpdeploy_train.sweep.space import Space, check_space, with_values
from vpdeploy_train.sweep.study import ERROR, LOCK_FILE, Pruner, ask, counts, draw, opened_study
from vpdeploy_train.training import console_progress, train_run
from vpdeploy_train.workbench import MakeProgress

logger = logging.getLogger("vpdeploy.train")


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep was asked to do.

    Attributes:
        settings: What all trials have in common.
        space: What they vary.
        out: The sweep's folder.
        trials: How many there should be in the end, those of earlier calls and other workers included.
        storage: URL of a database that several machines share; None takes a file in the folder.
        study: The study's name in the storage.
        pruner: How unpromising trials are found.
        cache_bytes: Memory that decoded images may take; None takes half of what is left free.
    """

    settings: TrainSettings
    space: Space
    out: Path
    trials: int
    storage: str | None = None
    study: str = "sweep"
    pruner: Pruner = "median"
    cache_bytes: int | None = None


def run_sweep(plan: SweepPlan, *, make_progress: MakeProgress = console_progress) -> SweepResult:
    """Run trials until the study has enough, and publish the best.

    Trials are judged on validation images alone. A sweep that is interrupted, or joined by further processes, goes on
    where the study stands: the same call again is all it takes. Images and backbone are loaded once.

    Args:
        plan: What the sweep is asked to do.
        make_progress: Makes the progress display of each phase of a trial.

    Raises:
        SpecError: Settings, space, data or storage do not fit.
        InputError: Images cannot be decoded.
    """
    plan = replace(plan, settings=plan.settings.located())
    check_space(plan.settings, plan.space)
    inputs = _load(plan)  # before the study is begun: what is refused can be corrected
    with opened_study(
        plan.out,
        url=plan.storage,
        name=plan.study,
        settings=plan.settings,
        space=plan.space,
        pruner=plan.pruner,
    ) as study:
        while True:
            mine = _next_claim(study, plan)
            if mine is None:
                break

            # The claim ends with the trial; what it changed is published before the next one begins.
            try:
                _run_trial(study, mine, plan, inputs, make_progress)
            finally:
                mine.release()
            with locked(plan.out / LOCK_FILE):
                publish(study, plan.out, plan.settings)
        with locked(plan.out / LOCK_FILE):
            return publish(study, plan.out, plan.settings)


def _load(plan: SweepPlan) -> TrainingInputs:
    inputs = load_inputs(plan.settings, cache_bytes=plan.cache_bytes)
    if not len(inputs.val):
        raise SpecError(f"{plan.settings.data}: no validation images to compare trials by; leave #final away")
    return inputs


def _next_claim(study: Study, plan: SweepPlan) -> Claim | None:
    """Begin the next trial, after those whose worker is gone were set free; None where there are enough."""
    with locked(plan.out / LOCK_FILE):
        reclaim(study, plan.out, is_local=plan.storage is None)
        if sum(map(counts, study.get_trials(deepcopy=False))) >= plan.trials:
            return None
        return claim(ask(study, seed=plan.settings.seed), plan.out)


def _run_trial(study: Study, mine: Claim, plan: SweepPlan, inputs: TrainingInputs, make_progress: MakeProgress) -> None:
    """Train one trial and tell the study how it ended."""
    trial = mine.trial
    number = f"trial {trial.number}"
    try:
        values = draw(trial, plan.space, method=plan.settings.method)
        settings = with_values(plan.settings, values)
        logger.info("%s: %s", number, ", ".join(f"{name} {_brief(value)}" for name, value in values.items()))
        result = train_run(
            settings,
            mine.folder,
            resume=(mine.folder / ARGS_FILE).is_file(),
            name=plan.study,
            make_progress=lambda phase, images, done: make_progress(f"{number}: {phase}", images, done),
            inputs=inputs,
            watch=_reporter(trial, settings.epochs),
        )
    except TrialPruned:
        logger.info("%s: stopped, it is not promising", number)
        study.tell(trial, state=TrialState.PRUNED)
    except TrainingError as error:
        logger.warning("%s: failed: %s", number, error)
        trial.set_user_attr(ERROR, str(error))
        study.tell(trial, state=TrialState.FAIL)
    except VpdeployError:  # the settings do not fit together; another trial may
        study.tell(trial, state=TrialState.FAIL)
        raise
    except BaseException:
        give_up(study, study.trials[trial.number])
        raise
    else:
        outcome = TrialOutcome.of(result)
        outcome.record(study, trial)
        logger.info("%s: validation accuracy %.4f", number, outcome.val_accuracy)


def _reporter(trial: Trial, epochs: int) -> Callable[[EpochRow], None]:
    """Return what reports the first phase's epochs and stops a trial that is not promising."""
    reported = 0

    def report(row: EpochRow) -> None:
        nonlocal reported
        if row.phase != FIRST_PHASE or row.epoch <= reported or math.isnan(row.val_accuracy):
            return
        reported = row.epoch
        trial.report(row.val_accuracy, row.epoch)
        if row.epoch < epochs and trial.should_prune():
            raise TrialPruned

    return report


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
