"""The phases of a run: train, and where asked for, score, prune, rewind and choose."""

from __future__ import annotations

from dataclasses import dataclass

from vpdeploy_train.head import fit_head
from vpdeploy_train.pace import Pace
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.race import candidate_of, race, rewind
from vpdeploy_train.pruning.report import PruningReport, report_of
from vpdeploy_train.pruning.request import shares_to_try
from vpdeploy_train.pruning.scores import score_prompts
from vpdeploy_train.pruning.search import Candidate, choose
from vpdeploy_train.shares import Shares
from vpdeploy_train.state import EpochRow, PhaseState
from vpdeploy_train.workbench import Workbench

FIRST_PHASE = "train"


@dataclass(frozen=True, kw_only=True)
class PhasesResult:
    """What the phases of a run end with.

    Attributes:
        model: The chosen model, with the tensors of its best epoch.
        phase: The phase that trained it.
        best: The epoch whose tensors the model has; 0 is the phase's start.
        epochs: How many epochs the phase was trained.
        start: The validation results of its start; None where nothing was validated.
        first_start: Those of the first phase's start: what the training as a whole has to beat.
        pace: The rates of all phases.
        history: The start and the epochs of all phases, in the order in which they were trained.
        report: What the pruning search did; None where nothing was pruned.
    """

    model: PromptedViT
    phase: str
    best: EpochRow
    epochs: int
    start: EpochRow | None
    first_start: EpochRow | None
    pace: Pace
    history: list[EpochRow]
    report: PruningReport | None


def run_phases(bench: Workbench) -> PhasesResult:
    """Train, and where asked for, search the smallest prompt set that is as good.

    Raises:
        SpecError: The method cannot be pruned as asked.
        TrainingError: The loss is not finite, or the stored state is damaged.
    """
    settings = bench.settings

    # Train everything, from the method's initial values and the asked-for start of the head.
    unpruned = bench.new_model(bench.new_method(settings.seed))
    if settings.head == "probe":
        fit_head(unpruned, bench.scoring, class_weights=settings.class_weights)
    initial = unpruned.trained_state()
    pace = bench.states.read(FIRST_PHASE).pace or bench.choose_pace(unpruned)
    state = bench.run_phase(FIRST_PHASE, unpruned, pace, until=settings.epochs)
    everything = candidate_of(FIRST_PHASE, unpruned, Shares(), state)
    if not settings.prunes:
        return _result(everything, state, pace, state.rows, None)

    # Score what was trained, and set up a smaller model for each share that is tried.
    scores = score_prompts(unpruned, bench.scoring_sample(), scope=settings.prune_scope)
    entrants = {
        f"prune-{number}": shares for number, shares in enumerate(shares_to_try(settings, unpruned.method), start=1)
    }
    models = {phase: rewind(bench, unpruned, scores, initial, phase, shares) for phase, shares in entrants.items()}

    # Retrain them against each other, and choose among them and the unpruned prompts.
    candidates, history = race(bench, entrants, models, pace, state.history)
    chosen = choose([everything, *candidates], slack=settings.prune_slack)
    report = report_of([everything, *candidates], chosen, scores, scope=settings.prune_scope, mode=settings.prune_mode)
    return _result(chosen, state, pace, state.rows + history, report)


def _result(
    chosen: Candidate, first: PhaseState, pace: Pace, history: list[EpochRow], report: PruningReport | None
) -> PhasesResult:
    return PhasesResult(
        model=chosen.model,
        phase=chosen.phase,
        best=chosen.best,
        epochs=chosen.epochs,
        start=chosen.start,
        first_start=first.start,
        pace=pace,
        history=history,
        report=report,
    )
