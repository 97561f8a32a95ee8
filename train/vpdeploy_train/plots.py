"""Pictures of a run: its curves and what pruning kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpdeploy.files import replacing_file
from vpdeploy_train.methods.e2vpt import SEGMENTS
from vpdeploy_train.pruning.search import PruningReport
from vpdeploy_train.state import EpochRow


def plot_curves(history: list[EpochRow], path: Path) -> None:
    """Draw loss and accuracy over the epochs of every phase."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    phases = list(dict.fromkeys(row.phase for row in history))
    for index, phase in enumerate(phases):
        rows = [row for row in history if row.phase == phase]
        epochs = [row.epoch for row in rows]
        colour = f"C{index}"
        marker = "o" if len(rows) == 1 else None
        loss.plot(epochs, [row.train_loss for row in rows], colour, ls=":", marker=marker)
        loss.plot(epochs, [row.val_loss for row in rows], colour, marker=marker, label=phase)
        accuracy.plot(epochs, [row.train_accuracy for row in rows], colour, ls=":", marker=marker)
        accuracy.plot(epochs, [row.val_accuracy for row in rows], colour, marker=marker, label=phase)
    loss.set(title="cross-entropy (dotted: training, solid: validation)", xlabel="epoch", ylabel="loss")
    accuracy.set(title="top-1 accuracy", xlabel="epoch", ylabel="accuracy")
    accuracy.legend()
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_pruning(report: PruningReport, path: Path) -> None:
    """Draw, for every block, which prompts and segments were kept, and the candidates of the search."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    tokens, kv_tokens, candidates = figure.subplots(1, 3, width_ratios=[2.4, 1.2, 1.6])
    _draw_tokens(tokens, report)
    _draw_kv_tokens(kv_tokens, report)
    _draw_candidates(candidates, report)
    _save(figure, path)


def _draw_tokens(axes: Axes, report: PruningReport) -> None:
    """Draw blocks × visual prompts: the share of segments kept, 0 for removed tokens."""
    columns = max((len(block) for block in report.token_scores), default=0)
    shares = np.full((len(report.token_scores), max(columns, 1)), np.nan)
    for block, scores in enumerate(report.token_scores):
        shares[block, : len(scores)] = 0.0
        for token, flags in zip(report.kept.tokens[block], report.kept.segments[block], strict=True):
            shares[block, token] = sum(flags)
    picture = axes.imshow(shares, vmin=0, vmax=SEGMENTS, cmap="Greens", aspect="auto")
    for block, scores in enumerate(report.token_scores):
        for token in set(range(len(scores))) - set(report.kept.tokens[block]):
            axes.text(token, block, "×", ha="center", va="center", color="firebrick")
    kept = sum(len(block) for block in report.kept.tokens)
    total = sum(len(block) for block in report.token_scores)
    axes.set(title=f"visual prompts: {kept} of {total} kept (× removed)", xlabel="prompt", ylabel="block")
    axes.figure.colorbar(picture, ax=axes, label=f"segments kept (of {SEGMENTS})")
    _count_up(axes, columns, len(report.token_scores))


def _draw_kv_tokens(axes: Axes, report: PruningReport) -> None:
    """Draw blocks × key/value prompts: kept or removed."""
    columns = max((len(block) for block in report.kv_scores), default=0)
    kept = np.zeros((len(report.kv_scores), max(columns, 1)))
    for block, indices in enumerate(report.kept.kv_tokens):
        kept[block, list(indices)] = 1.0
        for token in set(range(len(report.kv_scores[block]))) - set(indices):
            axes.text(token, block, "×", ha="center", va="center", color="firebrick")
    axes.imshow(kept, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    total = sum(len(block) for block in report.kv_scores)
    axes.set(title=f"key/value prompts: {int(kept.sum())} of {total}", xlabel="prompt", ylabel="block")
    _count_up(axes, columns, len(report.kv_scores))


def _draw_candidates(axes: Axes, report: PruningReport) -> None:
    """Draw validation accuracy over parameters for every candidate of the search."""
    for candidate in report.candidates:
        chosen = candidate["phase"] == report.chosen
        axes.plot(
            candidate["parameters"],
            candidate["val_accuracy"],
            marker="*" if chosen else "o",
            ms=14 if chosen else 7,
            color="firebrick" if chosen else "steelblue",
        )
        axes.annotate(
            f"{candidate['keep']:.0%} tokens\n{candidate['keep_segments']:.0%} segments",
            (candidate["parameters"], candidate["val_accuracy"]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            fontsize=8,
        )
    axes.set(title="the search (star: chosen)", xlabel="prompt parameters", ylabel="validation accuracy")
    axes.margins(0.22, 0.25)
    axes.grid(alpha=0.3)


def _count_up(axes: Axes, columns: int, rows: int) -> None:
    """Label every block, and prompts at a readable distance."""
    axes.set_yticks(range(rows))
    axes.set_xticks(range(0, columns, max(1, columns // 10)))


def _save(figure: Figure, path: Path) -> None:
    """Write a picture atomically, without the date that would make equal runs differ."""
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
