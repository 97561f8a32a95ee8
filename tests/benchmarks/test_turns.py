from __future__ import annotations

import pytest

from benchmarks.turns import Measured, measure_in_turns


def test_ratios_are_taken_within_a_round():
    found = Measured(seconds={"new": [0.01, 0.03, 0.02], "old": [0.02, 0.04, 0.02]})
    assert found.ratio("new", "old") == "0.750 (0.625-0.875)"  # of 0.5, 0.75 and 1
    assert found.median_ms("new") == pytest.approx(20.0)
    assert found.to_fields()["rounds"] == [
        {"new": 0.01, "old": 0.02},
        {"new": 0.03, "old": 0.04},
        {"new": 0.02, "old": 0.02},
    ]


def test_every_turn_begins_with_a_run_that_does_not_count():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "AB"}
    found = measure_in_turns(runs, 2, batch=1)
    assert "".join(order) == "AB" + "AABB" + "BBAA"  # the first two warm up
    assert [len(times) for times in found.seconds.values()] == [2, 2]


def test_an_interruption_ends_the_benchmark():
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_in_turns({"A": interrupt}, 2, batch=1)
