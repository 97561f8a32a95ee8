"""How many images a batch should hold at most: measured for this graph, runtime and machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpdeploy.errors import BackendError
from vpdeploy.session.batch_size_cache import BatchSizeCache
from vpdeploy.session.session import Session

MAX_BATCH_SIZE = 128
"""The largest size that is tried."""

BUDGET_S = 4.0
"""How long a measurement may take, in s; a run that was begun is ended."""

_WITHIN = 0.03
"""How much slower per image than the best size the chosen one may be."""

_CONTENDERS = 0.15
"""Sizes that a first look finds slower by more than this are not measured again."""

_TURN_S = 0.005
"""How long one turn of a size lasts at least, in s: single runs of a fast graph are all noise."""

_MAX_ROUNDS = 15

_NOTED_SIZES = 3
"""Where there was no time for as many sizes, nothing is noted: the machine may just have been busy."""

BatchRun = Callable[[int], None]
"""Runs one batch of so many images."""


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How many images a batch holds at most, and why.

    Attributes:
        size: Images.
        reason: Why that many, for people.
        images_per_s: What was measured, by size; empty where nothing was.
    """

    size: int
    reason: str
    images_per_s: Mapping[int, float]

    @classmethod
    def of(cls, images_per_s: Mapping[int, float], *, tried_all: bool, noted: bool = False) -> BatchSize:
        """Choose the smallest size within 3 % of the best: a larger one would only let images wait longer.

        Args:
            images_per_s: What was measured, by size, one at least.
            tried_all: Whether larger sizes were tried or ruled out, not given up for want of time.
            noted: Whether it was measured at an earlier start.
        """
        best = max(images_per_s.values())
        size = min(size for size, rate in images_per_s.items() if rate >= (1 - _WITHIN) * best)
        rates = ", ".join(f"{each}: {rate:.3g}" for each, rate in sorted(images_per_s.items()))
        reason = f"the smallest within {_WITHIN:.0%} of the fastest, measured {'earlier' if noted else 'now'}"
        reason += f" (images/s by size: {rates}"
        reason += ")" if tried_all else "; larger ones take too long to measure)"
        return cls(size=size, reason=reason, images_per_s=dict(images_per_s))

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        rates = {str(size): rate for size, rate in self.images_per_s.items()}
        return {"size": self.size, "reason": self.reason, "images_per_s": rates}


def choose_batch_size(
    session: Session, *, budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter
) -> BatchSize:
    """Find the batch size for a session: as noted beside the bundle by an earlier start, or by measuring.

    Nothing else should use the session or the machine meanwhile.

    Args:
        session: An open session, with or without tasks.
        budget_s: How long a measurement may take, in s; a run that was begun is ended.
        clock: Returns the time, in s.

    Returns:
        The size for ``BatchSettings(max_batch_size=...)``, with its reason.

    Raises:
        BackendError: The graph does not even run with one image.

    Example:
        >>> with vpdeploy.load(zoo) as session:
        ...     chosen = vpdeploy.choose_batch_size(session)
        ...     with vpdeploy.Batcher(session, vpdeploy.BatchSettings(max_batch_size=chosen.size)) as batcher:
        ...         chosen.size in chosen.images_per_s
        True
    """
    if noted := noted_batch_size(session):
        return noted
    limit = session.describe().runtime.max_batch or MAX_BATCH_SIZE
    with _sample_batches(session) as run:
        images_per_s, tried_all = measure_sizes(run, limit=min(limit, MAX_BATCH_SIZE), budget_s=budget_s, clock=clock)
    if tried_all or len(images_per_s) >= _NOTED_SIZES:
        BatchSizeCache.of(session).write(images_per_s, tried_all=tried_all)
    return BatchSize.of(images_per_s, tried_all=tried_all)


def noted_batch_size(session: Session) -> BatchSize | None:
    """Return the batch size that an earlier start measured for this graph, runtime and machine; None without one."""
    noted = BatchSizeCache.of(session).read()
    return None if noted is None else BatchSize.of(noted.images_per_s, tried_all=noted.tried_all, noted=True)


def measure_sizes(
    run: BatchRun, *, limit: int, budget_s: float, clock: Callable[[], float]
) -> tuple[dict[int, float], bool]:
    """Measure how many images a second run in batches of 1, 2, 4, ... and of ``limit``.

    Args:
        run: Runs one batch.
        limit: The largest size.
        budget_s: How long it may take, in s, from the end of the first run: that one may be compiling kernels. A size
            that would take longer than what is left is not begun.
        clock: Returns the time, in s.

    Returns:
        Images per second by size; and whether larger sizes were tried or ruled out, not given up for want of time.

    Raises:
        BackendError: The graph does not even run with one image.
    """
    run(1)
    ends_at = clock() + budget_s

    # A first look, upwards: until time is up, memory is, or twice as many images have twice not paid.
    first: dict[int, float] = {}  # seconds per image
    tried_all = True
    for size in _sizes(limit):
        # Twice: the first turn warms up, or one of them is disturbed. Half of the time is left for the rounds.
        expected = 2 * max(_TURN_S, size * min(first.values(), default=0.0))
        if first and clock() + expected > ends_at - budget_s / 2:
            tried_all = False
            break
        try:
            first[size] = min(_turn(run, size, clock) for _ in range(2))
        except BackendError:
            if not first:
                raise
            break  # out of memory, most likely: so many images are no choice
        if _stopped_paying(first):
            break
    contenders = [size for size in first if first[size] <= (1 + _CONTENDERS) * min(first.values())]

    # Rounds among those that may win, every other one backwards: what slows the machine down slows all of them alike.
    rounds: list[dict[int, float]] = []
    round_s = sum(max(_TURN_S, size * first[size]) for size in contenders)
    while len(contenders) > 1 and len(rounds) < _MAX_ROUNDS and clock() + round_s <= ends_at:
        order = contenders if len(rounds) % 2 else contenders[::-1]
        rounds.append({size: _turn(run, size, clock) for size in order})
    seconds = dict(first)
    if rounds:
        seconds |= _typical(rounds)
    return {size: 1 / each for size, each in seconds.items()}, tried_all


def _sizes(limit: int) -> Iterator[int]:
    """Yield the powers of two below ``limit``, and ``limit``."""
    size = 1
    while size < limit:
        yield size
        size *= 2
    yield limit


def _turn(run: BatchRun, size: int, clock: Callable[[], float]) -> float:
    """Return the time of one image in batches of a size, in s: over as many runs as a turn takes."""
    started = clock()
    runs, elapsed = 0, 0.0
    while elapsed < _TURN_S:
        run(size)
        runs += 1
        elapsed = clock() - started
    return elapsed / (runs * size)


def _stopped_paying(seconds: Mapping[int, float]) -> bool:
    """Tell whether each of the last two sizes is no better than the best before it."""
    sizes = list(seconds)
    return len(sizes) > 2 and min(seconds[size] for size in sizes[-2:]) > (1 - _WITHIN) * min(
        seconds[size] for size in sizes[:-2]
    )


def _typical(rounds: list[dict[int, float]]) -> dict[int, float]:
    """Return the sizes' times per image, in s: medians of their shares of a round's time, at a typical round's pace."""
    totals = [math.fsum(each.values()) for each in rounds]
    total = statistics.median(totals)
    return {
        size: total * statistics.median(each[size] / whole for each, whole in zip(rounds, totals, strict=True))
        for size in rounds[0]
    }


@contextmanager
def _sample_batches(session: Session) -> Iterator[BatchRun]:
    """Lend batches as a server runs them: images of noise, whose rows take turns at the loaded tasks."""
    side = session.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (MAX_BATCH_SIZE, side, side, 3), dtype=np.uint8)
    session.reserve_table()
    with ExitStack() as leases:
        used = [leases.enter_context(session.lease(task)).slot for task in session.tasks[:MAX_BATCH_SIZE]]
        slots = np.resize(np.array(used or [0], dtype=np.int32), MAX_BATCH_SIZE)

        def run(size: int) -> None:
            session.run(images[:size], slots[:size])

        yield run
