"""Measuring in turns: in every round all subjects run once, so that a machine whose speed drifts slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vpdeploy.bench.subject import Cell, Run

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


@dataclass(kw_only=True)
class Contest:
    """One cell and the subjects that run it in turns.

    Attributes:
        cell: Batch size and mix.
        runs: One for each subject.
        settling: Runs that begin each turn and do not count. The others have evicted a subject's weights from the
            caches; a model that is deployed alone does not take turns.
        rounds: Of each complete round, each subject's time, in s.
        spent_s: Time of all complete rounds, in s.
    """

    cell: Cell
    runs: Sequence[Run]
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
        contests: Without rounds; they are filled.
        budget: Of each contest.
        warm_up: Runs of each subject before, which do not count.
        clock: Returns the time, in s.
        on_round: Told the share that is done after each round, from 0 to 1.

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
