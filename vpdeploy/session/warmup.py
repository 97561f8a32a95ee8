"""Runs before the first request, so that no client pays for what a runtime does once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vpdeploy.session.session import Session

_BUDGET_S = 10.0
"""No further batch is begun when the ones before took as long as this together, in s."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What a warm-up ran.

    Attributes:
        sizes: The sizes of the batches.
        first_s: How long the very first run took, in s.
        again_s: How long a run of the same size took after it, in s.
    """

    sizes: tuple[int, ...]
    first_s: float
    again_s: float

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        first_ms, again_ms = self.first_s * 1e3, self.again_s * 1e3
        return f"batches of {sizes}; the first image took {first_ms:.1f} ms, the next {again_ms:.1f} ms"


def warm_up(
    session: Session,
    *,
    max_batch_size: int,
    budget_s: float = _BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> WarmUp | None:
    """Run one image twice, then batches of twice the size each time up to the largest one.

    The first run of a size is where runtimes choose kernels, capture graphs and take memory.

    Args:
        session: An open session.
        max_batch_size: The largest batch that will be asked for.
        budget_s: No further batch is begun when the ones before took as long as this together, in s.
        clock: Returns the time, in s; it never goes backwards.

    Returns:
        What was run; None where no task is loaded.

    Raises:
        BackendError: The runtime failed.
    """
    if not session.tasks:
        return None
    side = session.preprocessing.image_size
    began_at = clock()
    with session.lease(session.tasks[0]) as lease:

        def run(size: int) -> float:
            started_at = clock()
            session.run(np.zeros((size, side, side, 3), np.uint8), np.full(size, lease.slot, np.int32))
            return clock() - started_at

        first_s, again_s = run(1), run(1)
        sizes = [1]
        for size in _doublings(max_batch_size):
            if clock() - began_at >= budget_s:
                break
            run(size)
            sizes.append(size)
    return WarmUp(sizes=tuple(sizes), first_s=first_s, again_s=again_s)


def _doublings(most: int) -> list[int]:
    """Return 2, 4, 8 and so on below ``most``, and that."""
    sizes = []
    size = 2
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most] if most > 1 else []
