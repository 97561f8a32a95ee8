"""Measuring in turns, and what the measured times say.

In every round all subjects run once, so that a machine whose speed drifts slows all alike. Percentiles interpolate
linearly between order statistics, as NumPy does by default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vpdeploy.bench.mixes import MIXES
from vpdeploy.bench.subject import BatchRun, Cell
from vpdeploy.errors import SpecError

MIN_ROUNDS = 5
"""However slow a batch is, a cell is measured so often: quartiles of fewer say nothing."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long each cell is measured; one of the two is None.

    Attributes:
        duration_s: Time that the runs of all subjects take together, in s; at least ``MIN_ROUNDS`` rounds.
        count: Rounds.
    """

    duration_s: float | None = 5.0
    count: int | None = None

    def share_spent(self, rounds: int, spent_s: float) -> float:
        """Return the share of the budget that is spent, at most 1."""
        if self.count is not None:
            return min(1.0, rounds / self.count)
        time_share = spent_s / self.duration_s if self.duration_s else 1.0
        return min(1.0, rounds / MIN_ROUNDS, time_share)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how.

    Attributes:
        batch_sizes: Batch sizes to measure; where there are none, the usual ones or the one that a subject is fixed to.
        mixes: Keys of ``MIXES``; where there are none, uniform if there are several tasks, else one.
        tasks: Slots to fill in a bundle's table, with copies if need be; None fills one for each task.
        threads: CPU threads inside one run; None leaves it to the runtime.
        budget: How long each batch size and mix is measured.
        warm_up: Runs before each measurement that do not count.
        seed: The seed from which images and task numbers are drawn.
    """

    batch_sizes: tuple[int, ...] = ()
    mixes: tuple[str, ...] = ()
    tasks: int | None = None
    threads: int | None = None
    budget: Budget = field(default_factory=Budget)
    warm_up: int = 3
    seed: int = 0

    def check(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            SpecError: A batch size or a number of tasks is not positive, or there is no such mix.
        """
        for batch in self.batch_sizes:
            if batch < 1:
                raise SpecError(f"batch size {batch}: expected 1 or more; change --batch-sizes")
        for mix in self.mixes:
            if mix not in MIXES:
                raise SpecError(f"unknown mix '{mix}'; choose from: {', '.join(MIXES)}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a report's JSON form; what else was chosen shows in its subjects and results."""
        return {
            "duration_s": self.budget.duration_s,
            "count": self.budget.count,
            "warm_up": self.warm_up,
            "seed": self.seed,
            "tasks": self.tasks,
        }


@dataclass(kw_only=True)
class Contest:
    """One cell and the subjects that run it in turns.

    Attributes:
        cell: Batch size and mix.
        runs: What runs one batch, for each subject.
        settling: Runs that begin each turn and do not count. The others have evicted a subject's weights from the
            caches; a model that is deployed alone does not take turns.
        rounds: The subjects' times in each complete round, in s.
        spent_s: Time of all complete rounds, in s.
    """

    cell: Cell
    runs: Sequence[BatchRun]
    settling: int = 0
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    spent_s: float = 0.0

    def seconds(self, subject: int) -> list[float]:
        """Return the times of one subject, in s."""
        return [times[subject] for times in self.rounds]

    def add_round(self, times: tuple[float, ...]) -> None:
        """Keep the times of a complete round, one of each subject, in s."""
        self.rounds.append(times)
        self.spent_s += sum(times)


def measure(
    contests: Sequence[Contest],
    budget: Budget,
    *,
    warm_up: int,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[float], None] = lambda share: None,
) -> bool:
    """Fill the contests with rounds until each has spent the budget.

    Contests take turns too: every round visits all that go on, and every other round goes backwards, so that no subject
    always follows the same one.

    Args:
        contests: What to measure; they come without rounds and are filled.
        budget: How long each contest is measured.
        warm_up: Runs of each subject beforehand, which do not count.
        clock: Returns the time, in s.
        on_round: Called after each round with the share that is done, from 0 to 1.

    Returns:
        Whether it was completed; False after Ctrl-C, with the rounds that were complete by then.
    """
    try:
        for _ in range(warm_up):
            for contest in contests:
                for run in contest.runs:
                    run()
            on_round(0.0)
        backwards = False
        while going := [each for each in contests if _share_spent(each, budget) < 1]:
            for contest in reversed(going) if backwards else going:
                _run_round(contest, clock, backwards=backwards)
                on_round(sum(_share_spent(each, budget) for each in contests) / len(contests))
            backwards = not backwards
    except KeyboardInterrupt:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one batch takes, in ms.

    Attributes:
        mean: Arithmetic mean.
        p50: The median.
        p90: Nine of ten batches are at most this slow.
        p99: 99 of 100 batches; with fewer than 100 of them little more than the slowest.
    """

    mean: float
    p50: float
    p90: float
    p99: float

    def to_json(self) -> dict[str, float]:
        """Return the fields of the JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of times, taken within each round.

    Attributes:
        median: The median over the rounds; below 1 the first subject is faster.
        q1: First quartile.
        q3: Third quartile.
    """

    median: float
    q1: float
    q3: float

    def to_json(self) -> dict[str, float]:
        """Return the fields of the JSON form."""
        return asdict(self)


def summarise_latency(seconds: Sequence[float]) -> Latency:
    """Return statistics of the times of at least one batch, in s."""
    p50, p90, p99 = (float(each) * 1e3 for each in np.percentile(seconds, (50, 90, 99)))
    return Latency(mean=float(np.mean(seconds)) * 1e3, p50=p50, p90=p90, p99=p99)


def images_per_second(batch: int, seconds: Sequence[float]) -> float:
    """Return the images of all batches over the time of all batches."""
    return batch * len(seconds) / sum(seconds)


def summarise_ratio(seconds: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return statistics of ``seconds / others``, round by round; both hold one time for each round."""
    q1, median, q3 = (float(each) for each in np.percentile(np.divide(seconds, others), (25, 50, 75)))
    return Ratio(median=median, q1=q1, q3=q3)


def _share_spent(contest: Contest, budget: Budget) -> float:
    return budget.share_spent(len(contest.rounds), contest.spent_s)


def _run_round(contest: Contest, clock: Callable[[], float], *, backwards: bool) -> None:
    order = range(len(contest.runs))
    times: dict[int, float] = {}
    for subject in reversed(order) if backwards else order:
        run = contest.runs[subject]
        for _ in range(contest.settling):
            run()
        started = clock()
        run()
        times[subject] = clock() - started
    contest.add_round(tuple(times[subject] for subject in order))
