"""Variants of a model measured in turns by ``vpdeploy.bench``, and the text that benchmarks make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.bench.mixes import ONE
from vpdeploy.bench.rounds import Budget, Contest, measure, summarise_latency, summarise_ratio
from vpdeploy.bench.subject import BatchRun, Cell


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of variants by name.

    Attributes:
        seconds: Of each round.
    """

    seconds: Mapping[str, list[float]]

    def median_ms(self, name: str) -> float:
        """Return a variant's median time."""
        return summarise_latency(self.seconds[name]).p50

    def ratio(self, over: str, under: str) -> str:
        """Return the median of a ratio taken within each round, and its quartiles."""
        found = summarise_ratio(self.seconds[over], self.seconds[under])
        return f"{found.median:.3f} ({found.q1:.3f}-{found.q3:.3f})"

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        rounds = [dict(zip(self.seconds, times, strict=True)) for times in zip(*self.seconds.values(), strict=True)]
        return {"median_ms": {name: self.median_ms(name) for name in self.seconds}, "rounds": rounds}


def measure_in_turns(runs: Mapping[str, BatchRun], rounds: int, *, batch: int) -> Measured:
    """Let variants take turns on batches of so many images.

    A turn begins with a run that does not count: the others have evicted the variant's weights from the caches, and a
    deployed model does not take turns.
    """
    contest = Contest(cell=Cell(batch=batch, mix=ONE), runs=list(runs.values()), settling=1)
    if not measure([contest], Budget(duration_s=None, count=rounds), warm_up=1):
        raise KeyboardInterrupt
    return Measured(seconds={name: contest.seconds(index) for index, name in enumerate(runs)})
