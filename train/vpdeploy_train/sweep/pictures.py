"""The pictures of a sweep: trials in their order, by what was varied, and how much each setting mattered."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from vpdeploy_train.plots import save_picture

_BEST, _DONE, _STOPPED = "firebrick", "steelblue", "silver"
_FEW = 4
"""Trials below which importances are noise."""


def plot_study(study: Study, best: FrozenTrial, out: Path) -> None:
    """Draw ``history.png``, ``slices.png`` and, from four complete trials on, ``importances.png``.

    Args:
        study: With one complete trial at least.
        best: The best of them.
        out: Folder of the pictures.
    """
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    _plot_history(trials, best, out / "history.png")
    _plot_slices(done, best, out / "slices.png")
    if len(done) >= _FEW:
        _plot_importances(study, done, out / "importances.png")


def _plot_history(trials: list[FrozenTrial], best: FrozenTrial, path: Path) -> None:
    """Draw every trial's validation accuracy by epoch, and by trial with the best so far."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs, order = figure.subplots(1, 2)
    for trial in trials:
        reached = sorted(trial.intermediate_values.items())
        if not reached:
            continue
        colour = _colour(trial, best)
        epochs.plot(
            [step for step, _ in reached],
            [value for _, value in reached],
            color=colour,
            marker="o" if len(reached) == 1 or trial.state is not TrialState.COMPLETE else None,
            zorder=3 if trial.number == best.number else 2,
        )
    epochs.set(title="every trial (red: best, grey: stopped or under way)", xlabel="epoch")
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    highest, so_far = 0.0, []
    for trial in done:
        highest = max(highest, trial.value or 0.0)
        so_far.append(highest)
    numbers = [trial.number for trial in done]
    order.step(numbers, so_far, where="post", color="black", lw=1, label="best so far")
    order.scatter(
        numbers, [trial.value or 0.0 for trial in done], color=[_colour(trial, best) for trial in done], zorder=3
    )
    order.set(title="complete trials", xlabel="trial")
    order.legend()
    for axes in (epochs, order):
        axes.set_ylabel("validation accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    save_picture(figure, path)


def _plot_slices(done: list[FrozenTrial], best: FrozenTrial, path: Path) -> None:
    """Draw validation accuracy over each setting that was varied."""
    names = sorted({name for trial in done for name in trial.params})
    figure = Figure(figsize=(max(4.0, 3.2 * len(names)), 3.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        _draw_slice(axes, name, [trial for trial in done if name in trial.params], best)
    panels[0].set_ylabel("validation accuracy")
    save_picture(figure, path)


def _draw_slice(axes: Axes, name: str, trials: list[FrozenTrial], best: FrozenTrial) -> None:
    distribution = trials[0].distributions[name]
    heights = [trial.value or 0.0 for trial in trials]
    colours = [_colour(trial, best) for trial in trials]
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        axes.scatter([choices.index(trial.params[name]) for trial in trials], heights, color=colours, zorder=3)
        axes.set_xticks(range(len(choices)), [str(choice) for choice in choices], rotation=30, ha="right")
        axes.set_xlim(-0.5, len(choices) - 0.5)
    else:
        axes.scatter([trial.params[name] for trial in trials], heights, color=colours, zorder=3)
        if getattr(distribution, "log", False):
            axes.set_xscale("log")
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)


def _plot_importances(study: Study, done: list[FrozenTrial], path: Path) -> None:
    """Draw how much of the spread of accuracies each setting explains (PED-ANOVA, arXiv 2304.10255)."""
    if len({trial.value for trial in done}) < 2:
        return
    importances = get_param_importances(study)
    if not importances:
        return
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(importances)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(importances), list(importances.values()), color=_DONE)
    axes.invert_yaxis()
    axes.set(title=f"importance, from {len(done)} complete trials", xlabel="share", xlim=(0, 1))
    save_picture(figure, path)


def _colour(trial: FrozenTrial, best: FrozenTrial) -> str:
    if trial.number == best.number:
        return _BEST
    return _DONE if trial.state is TrialState.COMPLETE else _STOPPED
