"""The phases of a run: train, and where asked for, score, prune, rewind and choose."""

from __future__ import annotations

from dataclasses import dataclass

from vpdeploy_train.head import fit_head
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.race import candidate_at, race, rewind
from vpdeploy_train.pruning.report import PruningReport, report_of
from vpdeploy_train.pruning.request import shares_to_try
from vpdeploy_train.pruning.scores import score_prompts
from vpdeploy_train.pruning.search import choose
from vpdeploy_train.shares import Shares
from vpdeploy_train.state import EpochRow
from vpdeploy_train.workbench import Workbench

FIRST_PHASE = "train"


@dataclass(frozen=True, kw_only=True)
class PhasesResult:
    """What the phases of a run end with.

    Attributes:
        model: The chosen model, with the tensors of its best epoch.
        best: The epoch whose tensors the model has.
        history: The epochs of all phases, in the order in which they were trained.
        report: What the pruning search did; None where nothing was pruned.
    """

    model: PromptedViT
    best: EpochRow
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
        fit_head(unpruned, bench.scoring)
    initial = unpruned.trained_state()
    state = bench.run_phase(FIRST_PHASE, unpruned, until=settings.epochs)
    if not settings.prunes:
        return PhasesResult(model=unpruned, best=state.best_row, history=state.history, report=None)

    # Score what was trained, and set up a smaller model for each share that is tried.
    scores = score_prompts(unpruned, bench.scoring_sample(), scope=settings.prune_scope)
    entrants = {
        f"prune-{number}": shares for number, shares in enumerate(shares_to_try(settings, unpruned.method), start=1)
    }
    models = {phase: rewind(bench, unpruned, scores, initial, phase, shares) for phase, shares in entrants.items()}

    # Retrain them against each other, and choose among them and the unpruned prompts.
    everything = candidate_at(FIRST_PHASE, unpruned, Shares(), state, until=settings.epochs)
    candidates, history = race(bench, entrants, models, state.history)
    chosen = choose([everything, *candidates], slack=settings.prune_slack)
    report = report_of([everything, *candidates], chosen, scores, scope=settings.prune_scope, mode=settings.prune_mode)
    return PhasesResult(model=chosen.model, best=chosen.best, history=state.history + history, report=report)
