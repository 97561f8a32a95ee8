"""Statistics of measured times. Percentiles interpolate linearly between order statistics, NumPy's default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of times, taken within each round.

    Attributes:
        median: Over the rounds; below 1 the first is faster.
        q1: First quartile.
        q3: Third quartile.
    """

    median: float
    q1: float
    q3: float


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
