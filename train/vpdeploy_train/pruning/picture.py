"""The picture of a pruning search: what was kept in every block, and what each candidate costs and reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpdeploy_train.methods.kept import SEGMENTS
from vpdeploy_train.plots import save_picture
from vpdeploy_train.point_labels import label_points
from vpdeploy_train.pruning.report import PruningReport

_REMOVED = "firebrick"


def plot_pruning(report: PruningReport, path: Path) -> None:
    """Draw what was kept of every block, all candidates, and the chosen prompts beside the unpruned ones."""
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    (tokens, second), (candidates, change) = figure.subplots(2, 2, width_ratios=[1.6, 1])
    _draw_tokens(tokens, report)
    if report.hidden_scores:
        _draw_hidden(second, report)
    else:
        _draw_kv_tokens(second, report)
    labels = _draw_candidates(candidates, report)
    _draw_change(change, report)
    label_points(candidates, labels)
    save_picture(figure, path)


def _draw_tokens(axes: Axes, report: PruningReport) -> None:
    """Draw blocks × visual prompts: the share of segments kept, crosses for pruned tokens."""
    blocks, columns = len(report.token_scores), max((len(block) for block in report.token_scores), default=0)
    shares = np.full((blocks, max(columns, 1)), np.nan)
    pruned = 0
    for block, scores in enumerate(report.token_scores):
        live = {
            token: sum(flags)
            for token, flags in zip(report.kept.tokens[block], report.kept.segments[block], strict=True)
            if any(flags)
        }
        for token in range(len(scores)):
            shares[block, token] = live.get(token, 0)
            if token not in live:
                pruned += 1
                axes.text(token, block, "×", ha="center", va="center", color=_REMOVED)
    picture = axes.imshow(shares, vmin=0, vmax=SEGMENTS, cmap="Greens", aspect="auto")
    total = sum(len(block) for block in report.token_scores)
    manner = "removed" if report.mode == "remove" else "zero"
    axes.set(title=f"visual prompts: {total - pruned} of {total} kept (× {manner})", xlabel="prompt", ylabel="block")
    if report.divides_tokens:
        axes.figure.colorbar(picture, ax=axes, label=f"segments kept (of {SEGMENTS})")
    _count_up(axes, columns, blocks)


def _draw_kv_tokens(axes: Axes, report: PruningReport) -> None:
    """Draw blocks × key/value prompts: kept or removed."""
    blocks, columns = len(report.kv_scores), max((len(block) for block in report.kv_scores), default=0)
    if not columns:
        axes.text(0.5, 0.5, "no key/value prompts", ha="center", va="center")
        axes.set_axis_off()
        return
    kept = np.zeros((blocks, columns))
    for block, indices in enumerate(report.kept.kv_tokens):
        kept[block, list(indices)] = 1.0
        for token in set(range(len(report.kv_scores[block]))) - set(indices):
            axes.text(token, block, "×", ha="center", va="center", color=_REMOVED)
    axes.imshow(kept, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    total = sum(len(block) for block in report.kv_scores)
    title = f"key/value prompts: {int(kept.sum())} of {total} kept (× removed)"
    axes.set(title=title, xlabel="prompt", ylabel="block")
    _count_up(axes, columns, blocks)


def _draw_hidden(axes: Axes, report: PruningReport) -> None:
    """Draw the importance of a feature projector's hidden units, the removed ones in another colour."""
    units = range(len(report.hidden_scores))
    colours = ["steelblue" if unit in report.kept.hidden else _REMOVED for unit in units]
    axes.bar(units, report.hidden_scores, color=colours)
    title = f"hidden units: {len(report.kept.hidden)} of {len(units)} kept (red: removed)"
    axes.set(title=title, xlabel="hidden unit", ylabel="importance")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_candidates(axes: Axes, report: PruningReport) -> dict[tuple[float, float], str]:
    """Draw validation accuracy over parameters for every candidate, hollow where it was stopped early.

    Returns:
        The label of each point; points that coincide share one.
    """
    labels: dict[tuple[float, float], list[str]] = {}
    for row in report.candidates:
        chosen = row.phase == report.chosen
        colour = _REMOVED if chosen else "steelblue"
        axes.plot(
            row.parameters,
            row.val_accuracy,
            marker="*" if chosen else "o",
            ms=14 if chosen else 7,
            color=colour,
            fillstyle="full" if row.finished else "none",
        )
        text = f"{row.keep:.0%}" + ("" if row.finished else f"\nto epoch {row.epochs}")
        labels.setdefault((row.parameters, row.val_accuracy), []).append(text)
    title = "the search: shares of tokens (star: chosen; hollow: stopped early)"
    axes.set(title=title, xlabel="prompt parameters", ylabel="validation accuracy")
    axes.margins(0.1, 0.25)
    axes.grid(alpha=0.3)
    return {point: "\n".join(dict.fromkeys(texts)) for point, texts in labels.items()}


def _draw_change(axes: Axes, report: PruningReport) -> None:
    """Draw the chosen prompts' figures as shares of the unpruned ones'."""
    before, after = report.before, report.after
    rows: list[tuple[str, Any, Any]] = [
        ("parameters", before.parameters, after.parameters),
        ("bytes", before.size_bytes, after.size_bytes),
        ("validation accuracy", before.val_accuracy, after.val_accuracy),
    ]
    if before.macs is not None:
        rows.insert(2, ("MACs, whole model", before.macs, after.macs))
    shares = [chosen / unpruned if unpruned else 0.0 for _, unpruned, chosen in rows]
    axes.barh([name for name, _, _ in rows], shares, color="steelblue")
    axes.axvline(1.0, color="black", lw=1)
    for position, (_, unpruned, chosen) in enumerate(rows):
        text = f"{_brief(unpruned)} → {_brief(chosen)}"
        axes.text(0.02, position, text, va="center", ha="left", color="black", backgroundcolor=(1, 1, 1, 0.75))
    axes.invert_yaxis()
    axes.set(title=f"chosen ({report.chosen}) over unpruned", xlabel="share", xlim=(0, None))


def _brief(value: float) -> str:
    """Return a figure in few digits: 17.6G, 92.2k, 0.9061."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _count_up(axes: Axes, columns: int, rows: int) -> None:
    """Label every block, and prompts at a readable distance."""
    axes.set_yticks(range(rows))
    axes.set_xticks(range(0, columns, max(1, columns // 10)))
