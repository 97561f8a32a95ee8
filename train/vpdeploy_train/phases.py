"""The phases of a run: train, and where asked for, score, prune, rewind and choose."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vpdeploy_train.head import fit_head
from vpdeploy_train.loop import best_of, fit, load_stored, phase_seed
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.pruning.halving import rungs_of
from vpdeploy_train.pruning.report import PruningReport, report_of
from vpdeploy_train.pruning.request import shares_to_try
from vpdeploy_train.pruning.scores import Scores, prunable_method, score_prompts
from vpdeploy_train.pruning.search import Candidate, choose, kept_for, rank
from vpdeploy_train.pruning.shares import Shares
from vpdeploy_train.state import EpochRow, PhaseState
from vpdeploy_train.workbench import Workbench

FIRST_PHASE = "train"

TensorsByName = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PhasesResult:
    """What the phases of a run end with.

    Attributes:
        model: The chosen model, its best epoch's tensors.
        best: That epoch.
        history: Every epoch of every phase.
        report: The pruning search, if there was one.
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
    unpruned = bench.new_model(bench.new_method(settings.seed))
    if settings.head == "probe":
        fit_head(unpruned, bench.scoring)
    initial = unpruned.trained_state()
    state = run_phase(bench, FIRST_PHASE, unpruned, until=settings.epochs)
    if not settings.prunes:
        return PhasesResult(model=unpruned, best=state.best_row, history=state.history, report=None)
    everything = _candidate(FIRST_PHASE, unpruned, Shares(), state, until=settings.epochs)
    scores = score_prompts(unpruned, bench.scoring_sample(), scope=settings.prune_scope)
    entrants = {
        f"prune-{number}": shares for number, shares in enumerate(shares_to_try(settings, unpruned.method), start=1)
    }
    models = {phase: _rewound(bench, unpruned, scores, initial, phase, shares) for phase, shares in entrants.items()}
    candidates, history = _race(bench, entrants, models, state.history)
    chosen = choose([everything, *candidates], slack=settings.prune_slack)
    report = report_of([everything, *candidates], chosen, scores, scope=settings.prune_scope, mode=settings.prune_mode)
    return PhasesResult(model=chosen.model, best=chosen.best, history=state.history + history, report=report)


def run_phase(bench: Workbench, phase: str, model: PromptedViT, *, until: int) -> PhaseState:
    """Bring one phase to an epoch, from its stored state if there is one.

    Args:
        bench: What the run's phases share.
        phase: Its name.
        model: Trained in place; ends with the best epoch's tensors where the phase is finished.
        until: The epoch, counted from 1.
    """
    state = bench.states.read(phase)
    for row in state.history:
        bench.watch(row)
    if state.finished:
        load_stored(model, state.best, phase=phase)
        return state
    images = len(bench.train.dataset)
    with bench.make_progress(phase, images * until, images * len(state.history)) as progress:
        return fit(
            model,
            bench.train,
            bench.val,
            phase=phase,
            state=state,
            settings=bench.settings,
            fabric=bench.fabric,
            progress=progress,
            store=lambda state: bench.states.write(phase, state),
            until=until,
            watch=bench.watch,
        )


def _race(
    bench: Workbench, entrants: dict[str, Shares], models: dict[str, PromptedViT], unpruned: list[EpochRow]
) -> tuple[list[Candidate], list[EpochRow]]:
    """Train the candidates rung by rung, and stop the worse ones at each.

    What an entrant has reached at a rung is judged by its epochs up to there, so a resumed search goes the same way.

    Returns:
        All candidates, also the stopped ones, and their history, in the order in which they entered.
    """
    settings = bench.settings
    latest: dict[str, Candidate] = {}
    histories: dict[str, list[EpochRow]] = {}
    running = list(entrants)
    for rung in rungs_of(settings.prune_search, candidates=len(entrants), epochs=settings.epochs):
        for phase in running:
            state = run_phase(bench, phase, models[phase], until=rung.epochs)
            latest[phase] = _candidate(phase, models[phase], entrants[phase], state, until=rung.epochs)
            histories[phase] = state.history
        reference = best_of(unpruned[: rung.epochs]).val_accuracy
        ranked = rank([latest[phase] for phase in running], slack=settings.prune_slack, reference=reference)
        running = sorted((each.phase for each in ranked[: rung.survivors]), key=list(entrants).index)
    return [latest[phase] for phase in entrants], [row for phase in entrants for row in histories[phase]]


def _candidate(phase: str, model: PromptedViT, shares: Shares, state: PhaseState, *, until: int) -> Candidate:
    history = state.history[:until]
    return Candidate(
        phase=phase,
        model=model,
        shares=shares,
        parameters=int(model.method.summary()["parameters"]),
        best=best_of(history),
        epochs=len(history),
        finished=state.finished,
    )


def _rewound(
    bench: Workbench, unpruned: PromptedViT, scores: Scores, initial: TensorsByName, phase: str, shares: Shares
) -> PromptedViT:
    """Return a smaller model at its initial values: those of the run, or fresh ones of its own."""
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
    fresh = settings.rewind == "fresh"
    start = _fresh_state(bench, phase) if fresh else initial
    model = bench.new_model(prunable_method(unpruned).pruned_to(kept, _without_prefix(start, "method.")))
    model.head.load_state_dict(_without_prefix(start, "head."))
    if fresh and settings.head == "probe":
        fit_head(model, bench.scoring)
    return model


def _fresh_state(bench: Workbench, phase: str) -> TensorsByName:
    """Return initial values other than the run's own, the same whenever the phase is run."""
    return bench.new_model(bench.new_method(phase_seed(bench.settings.seed, phase))).trained_state()


def _without_prefix(state: TensorsByName, prefix: str) -> TensorsByName:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
