from __future__ import annotations

import pytest

from vpdeploy.bench.rounds import images_per_second, summarise_latency, summarise_ratio


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
