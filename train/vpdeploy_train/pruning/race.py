"""The race of the pruning search: smaller prompt sets start where training began, and the worse ones are stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vpdeploy_train.footprint import paper_parameters
from vpdeploy_train.head import fit_head
from vpdeploy_train.loop import best_of, phase_seed
from vpdeploy_train.pace import Pace
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.scores import Scores, prunable_method
from vpdeploy_train.pruning.search import Candidate, kept_for, rank
from vpdeploy_train.settings import PruneSearch
from vpdeploy_train.shares import Shares
from vpdeploy_train.state import EpochRow, PhaseState
from vpdeploy_train.workbench import Workbench

TensorsByName = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A point in the search.

    Attributes:
        epochs: How far every candidate that is still in the search is trained.
        survivors: How many of them go on from there.
    """

    epochs: int
    survivors: int


def race(
    bench: Workbench,
    entrants: dict[str, Shares],
    models: dict[str, PromptedViT],
    pace: Pace,
    unpruned: list[EpochRow],
) -> tuple[list[Candidate], list[EpochRow]]:
    """Train the candidates rung by rung, and stop the worse ones at each.

    What an entrant has reached at a rung is judged by its epochs up to there, so a resumed search goes the same way.
    Its start tells nothing of how it trains and does not count at a rung; it counts for what the search chooses.

    Args:
        bench: What the run's phases share.
        entrants: What each phase may keep.
        models: Each phase's model at its initial values; trained in place.
        pace: At what rates all are trained.
        unpruned: The trained epochs of the unpruned prompts, which compete at every rung.

    Returns:
        All candidates, those that were stopped among them, and their starts and epochs, in the order in which they
        entered.
    """
    settings = bench.settings
    states: dict[str, PhaseState] = {}
    running = list(entrants)
    for rung in rungs_of(settings.prune_search, candidates=len(entrants), epochs=settings.epochs):
        # Bring everyone who is still running to the rung.
        reached = []
        for phase in running:
            states[phase] = bench.run_phase(phase, models[phase], pace, until=rung.epochs)
            reached.append(candidate_at(phase, models[phase], entrants[phase], states[phase], until=rung.epochs))

        # Rank them there, the unpruned prompts at the same epoch among them, and let the best go on.
        reference = best_of(unpruned[: rung.epochs]).val_accuracy
        ranked = rank(reached, slack=settings.prune_slack, reference=reference)
        running = sorted((each.phase for each in ranked[: rung.survivors]), key=list(entrants).index)

    # What each came to: where it is finished, its model has its best tensors, and those may be its start's.
    candidates = [candidate_of(phase, models[phase], entrants[phase], states[phase]) for phase in entrants]
    return candidates, [row for phase in entrants for row in states[phase].rows]


def rungs_of(search: PruneSearch, *, candidates: int, epochs: int) -> list[Rung]:
    """Return the rungs of a search, the last of which is a full training.

    By halving, half of n candidates are left after a quarter of the epochs and a quarter of them after a half, rounded
    down but at least one; rungs that fall on one epoch are one. From four candidates on, and where a quarter of the
    epochs is a whole number, that costs n/2 full trainings at most: n · 1/4 + n/2 · 1/4 + n/4 · 1/2.
    """
    if search == "full":
        return [Rung(epochs=epochs, survivors=candidates)]
    half, quarter = max(1, candidates // 2), max(1, candidates // 4)
    survivors = {-(-epochs // 4): half}
    survivors[-(-epochs // 2)] = quarter
    survivors[epochs] = quarter
    return [Rung(epochs=reached, survivors=left) for reached, left in survivors.items()]


def candidate_at(phase: str, model: PromptedViT, shares: Shares, state: PhaseState, *, until: int) -> Candidate:
    """Return a phase as the search judges it at an epoch, counted from 1, by its trained epochs up to there.

    Args:
        phase: The phase's name.
        model: The phase's model.
        shares: What the phase may keep.
        state: The phase's state, which may have gone further than the epoch.
        until: The epoch, counted from 1.
    """
    history = state.history[:until]
    return replace(candidate_of(phase, model, shares, state), best=best_of(history), epochs=len(history))


def candidate_of(phase: str, model: PromptedViT, shares: Shares, state: PhaseState) -> Candidate:
    """Return what a phase has come to.

    Args:
        phase: The phase's name.
        model: The phase's model.
        shares: What the phase may keep.
        state: The phase's state.
    """
    return Candidate(
        phase=phase,
        model=model,
        shares=shares,
        parameters=paper_parameters(model.method),
        start=state.start,
        best=state.best_row,
        epochs=len(state.history),
        finished=state.finished,
    )


def rewind(
    bench: Workbench, unpruned: PromptedViT, scores: Scores, initial: TensorsByName, phase: str, shares: Shares
) -> PromptedViT:
    """Return a smaller model at its initial values: those of the run, or fresh ones of its own.

    Args:
        bench: What the run's phases share.
        unpruned: The trained, unpruned model.
        scores: The scores of its prompts.
        initial: The values that the trained tensors had before the training.
        phase: The phase that will train the smaller model.
        shares: How much the smaller model keeps.
    """
    # Decide what is kept, by the trained model's scores.
    settings = bench.settings
    kept = kept_for(
        unpruned,
        scores,
        bench.scoring_sample(),
        shares=shares,
        scope=settings.prune_scope,
        mode=settings.prune_mode,
        prune_kv=settings.prune_kv is not False,
    )

    # Set what is kept to initial values: pruned prompts are retrained from where training began.
    fresh = settings.rewind == "fresh"
    start = _fresh_state(bench, phase) if fresh else initial
    model = bench.new_model(prunable_method(unpruned).pruned_to(kept, _without_prefix(start, "method.")))
    model.head.load_state_dict(_without_prefix(start, "head."))
    if fresh and settings.head == "probe":
        fit_head(model, bench.scoring, class_weights=settings.class_weights)
    return model


def _fresh_state(bench: Workbench, phase: str) -> TensorsByName:
    """Return initial values other than the run's own, the same whenever the phase is run."""
    return bench.new_model(bench.new_method(phase_seed(bench.settings.seed, phase))).trained_state()


def _without_prefix(state: TensorsByName, prefix: str) -> TensorsByName:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
