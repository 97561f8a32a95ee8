"""What a benchmark found, in JSON's types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vpdeploy.bench.rounds import Contest
from vpdeploy.bench.statistics import images_per_second, summarise_latency, summarise_ratio
from vpdeploy.bench.subject import Subject
from vpdeploy.machine import describe_machine, peak_memory_bytes


def describe_benchmark(
    subjects: Sequence[Subject], contests: Sequence[Contest], settings: dict[str, Any], *, interrupted: bool
) -> dict[str, Any]:
    """Return the report of a measurement.

    Args:
        subjects: One, or two of which the first is compared with the second.
        contests: Measured; those without a complete round are left out.
        settings: How it was measured.
        interrupted: Whether it ended early.
    """
    return {
        "machine": describe_machine().to_json(),
        "settings": settings,
        "interrupted": interrupted,
        "subjects": [{"name": subject.name, **subject.facts()} for subject in subjects],
        "peak_memory_bytes": peak_memory_bytes(),
        "results": [
            describe_result(
                contest, index, subjects[index].name, against=1 if index == 0 and len(subjects) > 1 else None
            )
            for contest in contests
            if contest.rounds
            for index in range(len(subjects))
        ],
    }


def describe_result(contest: Contest, subject: int, name: str, *, against: int | None) -> dict[str, Any]:
    """Return what was measured of one subject in one cell.

    Args:
        contest: With at least one complete round.
        subject: Its index.
        name: Its name.
        against: The index of the subject that it is compared with, or None.
    """
    seconds = contest.seconds(subject)
    return {
        "subject": name,
        "batch": contest.cell.batch,
        "mix": contest.cell.mix,
        "rounds": len(seconds),
        "latency_ms": asdict(summarise_latency(seconds)),
        "images_per_s": images_per_second(contest.cell.batch, seconds),
        "ratio": None if against is None else asdict(summarise_ratio(seconds, contest.seconds(against))),
    }
