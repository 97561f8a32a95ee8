"""The picture of a run's curves."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpdeploy.files import replacing_file
from vpdeploy_train.state import EpochRow


def plot_curves(history: list[EpochRow], path: Path) -> None:
    """Draw loss and accuracy over the epochs of every phase; its start, which has no training loss, is at 0."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    phases = list(dict.fromkeys(row.phase for row in history))
    for index, phase in enumerate(phases):
        rows = [row for row in history if row.phase == phase]
        epochs = [row.epoch for row in rows]
        colour = colormaps["tab10" if len(phases) <= 10 else "tab20"](index % 20)
        marker = "o" if sum(epoch > 0 for epoch in epochs) == 1 else None
        loss.plot(epochs, [row.train_loss for row in rows], color=colour, ls=":", marker=marker)
        loss.plot(epochs, [row.val_loss for row in rows], color=colour, marker=marker, label=phase)
        accuracy.plot(epochs, [row.train_accuracy for row in rows], color=colour, ls=":", marker=marker)
        accuracy.plot(epochs, [row.val_accuracy for row in rows], color=colour, marker=marker, label=phase)
    loss.set(title="cross-entropy (dotted: training, solid: validation)", xlabel="epoch", ylabel="loss")
    accuracy.set(title="top-1 accuracy", xlabel="epoch", ylabel="accuracy")
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right upper", fontsize=8)  # beside the curves
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    save_picture(figure, path)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture atomically, without the date that would make equal runs differ."""
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
