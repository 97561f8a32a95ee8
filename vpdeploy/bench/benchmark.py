"""A benchmark: one or two subjects, the cells to measure, and how long."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from vpdeploy.bench.mixes import MIXES, ONE
from vpdeploy.bench.opening import Choice, open_subject
from vpdeploy.bench.report import describe_benchmark
from vpdeploy.bench.rounds import Budget, Contest, measure
from vpdeploy.bench.subject import Cell, Subject
from vpdeploy.errors import SpecError

DEFAULT_BATCH_SIZES = (1, 8, 32)
DEFAULT_MIX = "uniform"

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how.

    Attributes:
        batch_sizes: Empty: ``DEFAULT_BATCH_SIZES``, or the one that a subject is fixed to.
        mixes: Keys of ``MIXES``. Empty: uniform where there are several tasks, else one.
        tasks: Slots to fill in a bundle's table, with copies if need be; None: one for each task.
        threads: CPU threads inside one run; None leaves it to the runtime.
        budget: Of each batch size and mix.
        warm_up: Runs before each measurement that do not count.
        seed: Of images and task numbers.
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


def run_benchmark(
    choices: tuple[Choice, ...],
    settings: Settings,
    *,
    clock: Callable[[], float],
    on_round: Callable[[float], None],
) -> Report:
    """Load the subjects, measure them in turns and return the report.

    Args:
        choices: One, or two of which the first is compared with the second.
        settings: What to measure.
        clock: Returns the time, in s.
        on_round: Told the share that is done, from 0 to 1.

    Returns:
        The report, in JSON's types; ``interrupted`` tells whether Ctrl-C ended it early.

    Raises:
        VpdeployError: An artifact cannot be loaded, the settings do not go with it, or a run fails.
    """
    settings.check()
    with ExitStack() as stack:
        subjects: list[Subject] = []
        for choice, name in zip(choices, names_of(choices), strict=True):
            subject = open_subject(choice, name=name, threads=settings.threads, tasks=settings.tasks)
            subjects.append(stack.enter_context(closing(subject)))
        contests = [
            Contest(cell=cell, runs=[subject.prepare(cell, settings.seed) for subject in subjects])
            for cell in cells_of(subjects, settings)
        ]
        completed = measure(contests, settings.budget, warm_up=settings.warm_up, clock=clock, on_round=on_round)
        return describe_benchmark(subjects, contests, settings_fields(settings), interrupted=not completed)


def cells_of(subjects: list[Subject], settings: Settings) -> list[Cell]:
    """Return every combination of batch size and mix.

    Raises:
        SpecError: A subject takes one batch size only and another was asked for, or no subject has the tasks for a mix.
    """
    batch_sizes = settings.batch_sizes
    for subject in subjects:
        fixed = subject.fixed_batch
        if fixed is None:
            continue
        batch_sizes = batch_sizes or (fixed,)
        if other := [batch for batch in batch_sizes if batch != fixed]:
            raise SpecError(
                f"{subject.name}: its batch size is fixed to {fixed}, found {other[0]}; give --batch-sizes {fixed}, or "
                "export it with a dynamic batch"
            )
    most = max(subject.tasks for subject in subjects)
    if settings.tasks is not None and settings.tasks != most:
        raise SpecError(
            f"--tasks {settings.tasks}: only a bundle's table can be filled up; give a bundle, or no --tasks"
        )
    mixes = settings.mixes or (DEFAULT_MIX if most > 1 else ONE,)
    for mix in mixes:
        if mix != ONE and most == 1:
            raise SpecError(
                f"--mix {mix}: there is one task in {' and in '.join(subject.name for subject in subjects)}; give "
                f"--mix {ONE}, or --tasks N to fill a bundle with copies"
            )
    return [
        Cell(batch=batch, mix=mix)
        for batch in dict.fromkeys(batch_sizes or DEFAULT_BATCH_SIZES)
        for mix in dict.fromkeys(mixes)
    ]


def names_of(choices: tuple[Choice, ...]) -> list[str]:
    """Return what reports call each choice: the path's last part, or as much more as tells two of them apart."""
    names = [choice.path.name or str(choice.path) for choice in choices]
    if len(set(names)) < len(names):
        paths = [str(choice.path) for choice in choices]
        runtimes = [f"{name} ({choice.runtime})" for name, choice in zip(names, choices, strict=True)]
        letters = [f"{name} {letter}" for name, letter in zip(names, "AB", strict=True)]
        names = next(each for each in (paths, runtimes, letters) if len(set(each)) == len(each))
    return names


def settings_fields(settings: Settings) -> dict[str, Any]:
    """Return the settings of a report."""
    return {
        "duration_s": settings.budget.duration_s,
        "count": settings.budget.count,
        "warm_up": settings.warm_up,
        "seed": settings.seed,
        "tasks": settings.tasks,
    }
