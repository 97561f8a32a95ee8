"""Pictures of an evaluation: which classes are taken for which, and how good each class is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vpdeploy.text import cut_name
from vpdeploy_train.evaluation import Evaluation, RunEvaluation
from vpdeploy_train.plots import save_picture

CONFUSION_PICTURE: Final = "confusion.png"
CLASSES_PICTURE: Final = "classes.png"

_MOST_ROWS: Final = 50  # classes that each have a row of their own
_MOST_COUNTED: Final = 20  # classes whose cells have room for a number
_SHOWN: Final = 30  # of more classes, those that are shown by name
_MOST_CHARACTERS: Final = 24
_WRONG = "firebrick"
_RIGHT = "steelblue"


def plot_evaluation(found: RunEvaluation, folder: Path) -> tuple[Path, Path]:
    """Write ``confusion.png`` and ``classes.png`` of an evaluation into a folder, which is made where it is missing.

    Up to 50 classes have a row each; of more, the classes that are confused most and those that are worst are shown.

    Returns:
        The two pictures.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [_drawable(number, name) for number, name in enumerate(found.run.card.labels)]
    few = len(names) <= _MOST_ROWS
    side = max(5.0, 2.5 + 0.27 * len(names))

    # Which class is taken for which.
    figure = Figure(figsize=(side + 1.5, side) if few else (9, 9), layout="constrained")
    (_draw_matrix if few else _draw_pairs)(figure.subplots(), found.evaluation, names)
    save_picture(figure, folder / CONFUSION_PICTURE)

    # How good each class is.
    figure = Figure(figsize=(8, max(3.0, 1.5 + 0.24 * len(names))) if few else (13, 8), layout="constrained")
    if few:
        _draw_classes(figure.subplots(), found.evaluation, names, shown=len(names))
    else:
        everything, worst = figure.subplots(1, 2)
        _draw_ranks(everything, found.evaluation)
        _draw_classes(worst, found.evaluation, names, shown=_SHOWN)
    save_picture(figure, folder / CLASSES_PICTURE)
    return folder / CONFUSION_PICTURE, folder / CLASSES_PICTURE


def _draw_matrix(axes: Axes, evaluation: Evaluation, names: Sequence[str]) -> None:
    """Draw true × predicted class, each row as shares of its images."""
    counts = evaluation.confusion()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    positions = range(len(names))
    axes.set_xticks(positions, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(positions, names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=f"{evaluation.images} images, accuracy {evaluation.accuracy:.1%}")
    axes.figure.colorbar(
        picture, ax=axes, shrink=0.6, label="share of the true class's images", format=PercentFormatter(1.0)
    )
    if len(names) <= _MOST_COUNTED:
        for true, predicted in np.argwhere(counts):
            colour = "white" if shares[true, predicted] > 0.5 else "black"
            number = str(counts[true, predicted])
            axes.text(predicted, true, number, ha="center", va="center", color=colour, fontsize=8)


def _draw_pairs(axes: Axes, evaluation: Evaluation, names: Sequence[str]) -> None:
    """Draw the pairs of classes that are confused most."""
    pairs = evaluation.confused(_SHOWN)
    wrong = round((1 - evaluation.accuracy) * evaluation.images)
    axes.set(title=f"most confused of {len(names)} classes\n({wrong} of {evaluation.images} images are mistaken)")
    if not pairs:
        axes.text(0.5, 0.5, "no image is mistaken", ha="center", va="center")
        axes.set_axis_off()
        return
    images = evaluation.class_images
    bars = axes.barh(range(len(pairs)), [pair.images for pair in pairs], color=_WRONG)
    axes.bar_label(bars, [f"{pair.images} of {images[pair.true]}" for pair in pairs], padding=3, fontsize=8)
    axes.set_yticks(
        range(len(pairs)),
        [f"{names[pair.true]} → {names[pair.predicted]}" for pair in pairs],
        fontsize=8,
        parse_math=False,
    )
    axes.set(xlabel="images", ylabel="true → predicted")
    _list_down(axes)


def _draw_classes(axes: Axes, evaluation: Evaluation, names: Sequence[str], *, shown: int) -> None:
    """Draw the accuracy of the worst classes, with their numbers of images."""
    images, right = evaluation.class_images, evaluation.class_right
    order = evaluation.worst_classes()[:shown]
    shares = right[order] / images[order]
    bars = axes.barh(range(len(order)), shares, color=_RIGHT)
    axes.bar_label(bars, [f"{right[each]} of {images[each]}" for each in order], padding=3, fontsize=8)
    axes.set_yticks(range(len(order)), [names[each] for each in order], fontsize=8, parse_math=False)
    absent = len(names) - int((images > 0).sum())
    title = f"accuracy of the {len(order)} classes" if shown == len(names) else f"the {len(order)} worst classes"
    title += f" ({absent} more have no image)" if absent else ""
    axes.set(title=title, xlabel="accuracy (right of all)", xlim=(0, 1.15))
    axes.axvline(evaluation.accuracy, color="black", lw=1, ls=":")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xticks(np.linspace(0, 1, 6))
    _list_down(axes, whole=False)


def _draw_ranks(axes: Axes, evaluation: Evaluation) -> None:
    """Draw the accuracy of all classes from the worst to the best, and above it how many images they have."""
    images, right = evaluation.class_images, evaluation.class_right
    order = evaluation.worst_classes()
    shares = right[order] / images[order]
    axes.fill_between(range(len(order)), shares, color=_RIGHT, alpha=0.35, step="mid")
    axes.plot(range(len(order)), shares, color=_RIGHT)
    axes.axhline(evaluation.accuracy, color="black", lw=1, ls=":")
    least, most = (int(images[order].min()), int(images[order].max())) if len(order) else (0, 0)
    count = f"{least}" if least == most else f"{least} to {most}"
    axes.set(
        title=f"accuracy of {len(order)} classes with {count} images each\n(dotted: of all images)",
        xlabel="classes, from the worst",
        ylabel="accuracy",
        ylim=(0, 1.02),
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _list_down(axes: Axes, *, whole: bool = True) -> None:
    """Have bars listed from above, close to the edges."""
    axes.margins(x=0.12 if whole else None, y=0.01)
    axes.invert_yaxis()
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _drawable(number: int, name: str) -> str:
    """Return a class name as the pictures' font can show it; its number stands before it where it lost something."""
    cut = cut_name(name, _MOST_CHARACTERS)
    shown = "".join(character if ord(character) in _glyphs() else "□" for character in cut)
    return shown if shown == name else f"{number}: {shown}"


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points that matplotlib's default font has; for others it warns once a character."""
    font: Any = get_font(findfont(FontProperties()))
    return frozenset(font.get_charmap())
