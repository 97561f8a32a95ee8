"""Dividing one split into two, class by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vpdeploy_train.data.example import Example


def carve(
    examples: Sequence[Example], fraction: float, *, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Divide examples into a rest and a carved part, stratified by class.

    Of each class the rounded share is carved, at least one image and never all of them, so every class is on
    both sides. Which images are carved depends on ``seed``, the class and the examples' order alone.

    Args:
        examples: At least two of each class that occurs.
        fraction: Share of each class to carve, in (0, 1).
        seed: Any integer.

    Returns:
        The rest and the carved part, both in the order of ``examples``.
    """
    by_class: dict[int, list[int]] = {}
    for position, example in enumerate(examples):
        by_class.setdefault(example.label, []).append(position)
    carved: set[int] = set()
    for label, positions in by_class.items():
        count = min(max(1, round(len(positions) * fraction)), len(positions) - 1)
        generator = np.random.default_rng((seed % 2**64, label))
        carved.update(positions[index] for index in generator.permutation(len(positions))[:count])
    rest = tuple(example for position, example in enumerate(examples) if position not in carved)
    return rest, tuple(examples[position] for position in sorted(carved))
