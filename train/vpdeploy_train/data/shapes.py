"""Procedural tasks about the structure of an image: how many shapes, where the shape is, where the arrow points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from vpdeploy_train.data.canvas import OUTLINES, SIDE, Canvas
from vpdeploy_train.data.collection import Collection, Format, Item

SIZES: Final[Mapping[str, int]] = {"train": 1_000, "val": 300, "test": 500}
"""Number of images in each split."""

_SEED = 230_713_770
_SPLIT_KEYS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class ShapeTask:
    """A question about a drawn image.

    Attributes:
        key: Part of every image's seed.
        labels: The possible answers.
        draw: Draws an image whose answer is ``labels[index]`` for a given index.
    """

    key: int
    labels: tuple[str, ...]
    draw: Callable[[Canvas, int], None]


def draw_count(canvas: Canvas, index: int) -> None:
    """Draw ``index + 1`` shapes of any kind that do not touch."""
    generator = canvas.generator
    placed: list[tuple[float, float, float]] = []
    while len(placed) <= index:
        radius = generator.uniform(4.5, 8.0)
        x, y = generator.uniform(radius + 1, SIDE - radius - 1, size=2)
        if all(math.hypot(x - a, y - b) > radius + r + 1.5 for a, b, r in placed):
            placed.append((x, y, radius))
    for x, y, radius in placed:
        outline = OUTLINES[generator.choice(list(OUTLINES))]
        canvas.draw(outline, (x, y), radius, generator.uniform(0, 2 * math.pi))


def draw_location(canvas: Canvas, index: int) -> None:
    """Draw one shape in cell ``index`` of a 3×3 grid, anywhere in the cell."""
    generator = canvas.generator
    row, column = divmod(index, 3)
    x, y = (SIDE / 3) * (np.array([column, row]) + generator.uniform(0.2, 0.8, size=2))
    outline = OUTLINES[generator.choice(list(OUTLINES))]
    canvas.draw(outline, (float(x), float(y)), generator.uniform(6.0, 11.0), generator.uniform(0, 2 * math.pi))


def draw_orientation(canvas: Canvas, index: int) -> None:
    """Draw an arrow that points to the compass direction ``index``, clockwise from north, give or take 12°."""
    generator = canvas.generator
    angle = math.radians(45 * index - 90 + generator.uniform(-12, 12))
    radius = generator.uniform(18, 26)
    x, y = generator.uniform(radius + 1, SIDE - radius - 1, size=2)
    canvas.draw(canvas.arrow_outline(), (x, y), radius, angle)


TASKS: Final[Mapping[str, ShapeTask]] = {
    "shapes:count": ShapeTask(key=1, labels=tuple(str(count) for count in range(1, 7)), draw=draw_count),
    "shapes:location": ShapeTask(
        key=2,
        labels=(
            *("top-left", "top", "top-right"),
            *("left", "centre", "right"),
            *("bottom-left", "bottom", "bottom-right"),
        ),
        draw=draw_location,
    ),
    "shapes:orientation": ShapeTask(
        key=3,
        labels=("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"),
        draw=draw_orientation,
    ),
}
"""Every task; their classes are equally frequent."""


def read_shapes(spec: str) -> Collection:
    """Draw a task's images, 64×64 pixels; every image of every task and split has a seed of its own.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    return _draw_task(spec)


@cache
def _draw_task(spec: str) -> Collection:
    """Draw all images of a task."""
    task = TASKS[spec]
    return Collection(
        splits={
            split: tuple(_draw_item(task, _SPLIT_KEYS[split], number) for number in range(size))
            for split, size in SIZES.items()
        },
        augmentation="none",
    )


def _draw_item(task: ShapeTask, split_key: int, number: int) -> Item:
    """Draw one image of a task."""
    index = number % len(task.labels)
    canvas = Canvas(np.random.default_rng((_SEED, task.key, split_key, number)))
    task.draw(canvas, index)
    return Item(source=canvas.to_pixels(), class_name=task.labels[index])


FORMAT: Final = Format(
    spelling="shapes:TASK",
    names=tuple(TASKS),
    # A folder may be called "shapes", too.
    matches=lambda spec: spec.startswith("shapes:") or (spec == "shapes" and not Path(spec).is_dir()),
    locate=lambda spec: None,
    read=read_shapes,
)
