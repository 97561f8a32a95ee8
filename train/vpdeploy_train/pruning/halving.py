"""Successive halving: how far each candidate of the pruning search is trained before the worse ones are stopped."""

from __future__ import annotations

from dataclasses import dataclass

from vpdeploy_train.settings import PruneSearch


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A point in the search.

    Attributes:
        epochs: How far every candidate that is still in the search is trained.
        survivors: How many of them go on from there.
    """

    epochs: int
    survivors: int


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
