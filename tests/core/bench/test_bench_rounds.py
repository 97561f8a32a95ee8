from __future__ import annotations

import pytest

from vpdeploy.bench.rounds import (
    MIN_ROUNDS,
    Budget,
    Contest,
    images_per_second,
    measure,
    summarise_latency,
    summarise_ratio,
)
from vpdeploy.bench.subject import BatchRun, Cell


class Stage:
    """A clock that only runs move, and the order in which they ran."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []
        self.shares: list[float] = []

    def clock(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float) -> BatchRun:
        """A run that takes the given times, the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call

    def interrupting(self, name: str, after: int) -> BatchRun:
        calls = [0]

        def call() -> None:
            calls[0] += 1
            self.order.append(name)
            self.now += 1.0
            if calls[0] > after:
                raise KeyboardInterrupt

        return call

    def measure(self, contests: list[Contest], budget: Budget, *, warm_up: int = 0) -> bool:
        return measure(contests, budget, warm_up=warm_up, clock=self.clock, on_round=self.shares.append)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def contest(*runs: BatchRun, batch: int = 1) -> Contest:
    return Contest(cell=Cell(batch=batch, mix="one"), runs=runs)


def test_two_subjects_take_turns_and_every_other_round_goes_backwards(stage: Stage):
    assert stage.measure([contest(stage.run("A", 1.0), stage.run("B", 1.0))], Budget(duration_s=None, count=4))
    assert "".join(stage.order) == "ABBAABBA"


def test_cells_take_turns_too(stage: Stage):
    cells = [contest(stage.run("a", 1.0), stage.run("b", 1.0)), contest(stage.run("C", 1.0), stage.run("D", 1.0))]
    stage.measure(cells, Budget(duration_s=None, count=2))
    assert "".join(stage.order) == "abCDDCba"


def test_times_belong_to_their_subject_whatever_the_order(stage: Stage):
    one = contest(stage.run("A", 1.0, 2.0, 3.0), stage.run("B", 10.0, 20.0, 30.0))
    stage.measure([one], Budget(duration_s=None, count=3))
    assert one.rounds == [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    assert one.seconds(1) == [10.0, 20.0, 30.0]


def test_warm_up_runs_do_not_count(stage: Stage):
    one = contest(stage.run("A", 9.0, 9.0, 1.0))
    stage.measure([one], Budget(duration_s=None, count=3), warm_up=2)
    assert (len(stage.order), one.seconds(0)) == (5, [1.0, 1.0, 1.0])


def test_runs_that_settle_a_turn_do_not_count(stage: Stage):
    one = Contest(
        cell=Cell(batch=1, mix="one"), runs=[stage.run("A", 9.0, 1.0, 9.0, 2.0), stage.run("B", 9.0, 3.0)], settling=1
    )
    stage.measure([one], Budget(duration_s=None, count=2))
    assert "".join(stage.order) == "AABBBBAA"
    assert one.rounds == [(1.0, 3.0), (2.0, 3.0)]
    assert one.spent_s == 9.0


def test_a_duration_is_shared_by_the_subjects_of_a_cell(stage: Stage):
    one = contest(stage.run("A", 0.25), stage.run("B", 0.75))
    stage.measure([one], Budget(duration_s=8.0))
    assert len(one.rounds) == 8


def test_slow_batches_are_measured_a_minimum_of_rounds(stage: Stage):
    one = contest(stage.run("A", 60.0))
    stage.measure([one], Budget(duration_s=5.0))
    assert len(one.rounds) == MIN_ROUNDS


def test_a_cell_that_is_done_leaves_and_the_others_go_on(stage: Stage):
    slow, fast = contest(stage.run("s", 4.0)), contest(stage.run("f", 1.0))
    stage.measure([slow, fast], Budget(duration_s=20.0))
    assert (len(slow.rounds), len(fast.rounds)) == (5, 20)
    assert "".join(stage.order) == "sffssffssf" + 15 * "f"


def test_progress_grows_to_one(stage: Stage):
    stage.measure([contest(stage.run("A", 1.0)), contest(stage.run("B", 1.0))], Budget(duration_s=None, count=2))
    assert stage.shares == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("after", "rounds"), [(0, 0), (1, 1), (2, 2)])
def test_an_interruption_keeps_complete_rounds_only(stage: Stage, after: int, rounds: int):
    one = contest(stage.run("A", 1.0), stage.interrupting("B", after))
    assert not stage.measure([one], Budget(duration_s=None, count=9))
    assert one.rounds == [(1.0, 1.0)] * rounds


def test_an_interruption_while_warming_up_measures_nothing(stage: Stage):
    one = contest(stage.interrupting("A", 1))
    assert not stage.measure([one], Budget(), warm_up=3)
    assert one.rounds == []


def test_an_error_of_a_run_is_not_swallowed(stage: Stage):
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stage.measure([contest(fail)], Budget())


@pytest.mark.parametrize(
    ("budget", "rounds", "spent_s", "share"),
    [
        (Budget(duration_s=10.0), 50, 2.5, 0.25),
        (Budget(duration_s=10.0), 1, 30.0, 0.2),  # one of five rounds
        (Budget(duration_s=10.0), 5, 30.0, 1.0),
        (Budget(duration_s=None, count=4), 3, 999.0, 0.75),
        (Budget(duration_s=None, count=4), 4, 0.0, 1.0),
    ],
)
def test_a_budget_is_spent_by_its_own_measure(budget: Budget, rounds: int, spent_s: float, share: float):
    assert budget.share_spent(rounds, spent_s) == pytest.approx(share)


def test_runs_are_timed_apart_from_what_lies_between(stage: Stage):
    def on_round(share: float) -> None:
        stage.now += 50.0

    one = contest(stage.run("A", 1.0))
    measure([one], Budget(duration_s=None, count=3), warm_up=1, clock=stage.clock, on_round=on_round)
    assert one.seconds(0) == [1.0, 1.0, 1.0]


# --- statistics ---


def test_percentiles_interpolate_between_sorted_times():
    # Sorted: 1, 2, 3, 4, 5 ms at places 0 to 4. p90 is at place 0.9 * 4 = 3.6, p99 at 3.96.
    found = summarise_latency([0.003, 0.005, 0.001, 0.004, 0.002])
    assert (found.mean, found.p50) == (pytest.approx(3.0), pytest.approx(3.0))
    assert (found.p90, found.p99) == (pytest.approx(4.6), pytest.approx(4.96))


def test_one_time_is_every_percentile():
    found = summarise_latency([0.25])
    assert [found.mean, found.p50, found.p90, found.p99] == [250.0] * 4


def test_the_median_of_an_even_number_lies_between_the_middle_two():
    assert summarise_latency([0.001, 0.002, 0.010, 0.004]).p50 == pytest.approx(3.0)


def test_throughput_is_all_images_over_all_time():
    # 16 images in 2 s; the mean of the batches' own rates, 16 and 5.33, would be 10.67.
    assert images_per_second(8, [0.5, 1.5]) == 8.0


def test_quartiles_of_ratios():
    # 3, 1, 2, 4, 5: quartiles at places 1, 2 and 3.
    found = summarise_ratio([3.0, 2.0, 1.0, 4.0, 10.0], [1.0, 2.0, 0.5, 1.0, 2.0])
    assert (found.q1, found.median, found.q3) == (2.0, 3.0, 4.0)


def test_a_ratio_is_taken_within_each_round_so_that_drift_cancels():
    speed = [1.0, 2.0, 7.0, 3.0]
    found = summarise_ratio([0.9 * each for each in speed], speed)
    assert (found.q1, found.median, found.q3) == tuple(pytest.approx(0.9) for _ in range(3))
