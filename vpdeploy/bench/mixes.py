"""Task mixes: which task each row of a batch belongs to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import SpecError

Tasks = npt.NDArray[np.int32]

ZIPF_EXPONENT = 1.1

DISTINCT = "distinct"
ONE = "one"


def one_task(tasks: int) -> npt.NDArray[np.float64]:
    """Return the share of each task, float64 [tasks]: all rows ask the first."""
    shares = np.zeros(tasks)
    shares[0] = 1.0
    return shares


def uniform(tasks: int) -> npt.NDArray[np.float64]:
    """Return the share of each task, float64 [tasks]: the same for all."""
    return np.full(tasks, 1.0 / tasks)


def zipf(tasks: int) -> npt.NDArray[np.float64]:
    """Return the share of each task, float64 [tasks]: the k-th has 1 / k^1.1, up to a factor."""
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


MIXES: dict[str, Callable[[int], npt.NDArray[np.float64]]] = {
    ONE: one_task,
    "uniform": uniform,
    "zipf": zipf,
    DISTINCT: uniform,
}
"""Each task's share of the rows, by the name that ``--mix`` takes; ``distinct`` draws without putting back."""


def check_mix(mix: str, *, batch: int, tasks: int, name: str) -> None:
    """Check that a mix can be made of so many tasks.

    Args:
        mix: The mix's name.
        batch: Rows of a batch.
        tasks: How many tasks there are to choose from.
        name: What holds the tasks, for the message.

    Raises:
        SpecError: There is no such mix, or there are too few tasks for it.
    """
    if mix not in MIXES:
        raise SpecError(f"unknown mix '{mix}'; choose from: {', '.join(MIXES)}")
    needed = {ONE: 1, DISTINCT: batch}.get(mix, 2)
    if tasks < needed:
        wanted = (
            f"a batch of {batch} needs {needed} tasks" if mix == DISTINCT else f"at least {needed} tasks are needed"
        )
        raise SpecError(
            f"--mix {mix}: {wanted}, {name} has {tasks}; --tasks {needed} fills a bundle up with copies"
            + (", or choose smaller --batch-sizes" if mix == DISTINCT else "")
        )


def draw_tasks(mix: str, *, batch: int, tasks: int, rng: np.random.Generator) -> Tasks:
    """Return the task of each row, int32 [B], numbers in [0, tasks).

    Args:
        mix: A key of ``MIXES``, checked by ``check_mix``.
        batch: Rows, B.
        tasks: How many tasks there are to choose from.
        rng: The generator that draws them.
    """
    return rng.choice(tasks, size=batch, replace=mix != DISTINCT, p=MIXES[mix](tasks)).astype(np.int32)
