"""A benchmark: from paths to subjects, the cells to measure, and the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from vpdeploy.backends import AUTO
from vpdeploy.bench.deployed import DeployedSubject
from vpdeploy.bench.foreign import ForeignSubject
from vpdeploy.bench.mixes import ONE
from vpdeploy.bench.report import BenchmarkReport
from vpdeploy.bench.rounds import Contest, Settings, measure
from vpdeploy.bench.subject import Cell, Subject
from vpdeploy.engines.store import find_engine
from vpdeploy.errors import BundleError, EngineIncompatibleError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import is_bundle
from vpdeploy.format.folded import METADATA_KEY
from vpdeploy.format.onnxfile import read_metadata
from vpdeploy.inspection.engines import artifact_of_engine, engine_misfit, read_engine_card
from vpdeploy.machine import find_gpu

DEFAULT_BATCH_SIZES = (1, 8, 32)
DEFAULT_MIX = "uniform"

_ENGINE_SUFFIX = ".engine"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be measured.

    Attributes:
        path: A bundle, an ONNX file, or an engine beside its graph.
        runtime: A runtime's name, or ``auto``.
    """

    path: Path
    runtime: str = AUTO


def run_benchmark(
    choices: tuple[Choice, ...],
    settings: Settings,
    *,
    clock: Callable[[], float],
    on_round: Callable[[float], None],
) -> BenchmarkReport:
    """Load the subjects, measure them in turns and return the report.

    Args:
        choices: One path, or two of which the first is compared with the second.
        settings: What to measure.
        clock: Returns the time, in s.
        on_round: Called with the share that is done, from 0 to 1.

    Returns:
        The report; ``interrupted`` tells whether Ctrl-C ended it early.

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
        return BenchmarkReport.of(subjects, contests, settings, interrupted=not completed)


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


def open_subject(choice: Choice, *, name: str, threads: int | None, tasks: int | None) -> Subject:
    """Load what a path names.

    Args:
        choice: The path, and the runtime to load it with.
        name: What reports call it.
        threads: CPU threads inside one run; None leaves it to the runtime.
        tasks: How many slots of a bundle's table to fill; None fills one for each of its tasks.

    Raises:
        BundleError: The path is nothing that can be measured, or is damaged.
        EngineIncompatibleError: An engine does not fit this machine.
        SpecError: The runtime or the number of tasks does not go with it.
        BackendError: The runtime does not work here.
    """
    path = choice.path
    if path.suffix == _ENGINE_SUFFIX:
        return _open_engine(choice, name=name, threads=threads, tasks=tasks)
    if is_bundle(path):
        return _open_deployed(path, name=name, runtime=choice.runtime, threads=threads, tasks=tasks)
    if not path.is_file() or path.suffix != ".onnx":
        state = "does not exist" if not path.exists() else "is none of these"
        raise BundleError(f"{path}: {state}; expected a bundle folder, an .onnx file or a file engines/KEY.engine")
    if METADATA_KEY in read_metadata(path):
        return _open_deployed(path, name=name, runtime=choice.runtime, threads=threads, tasks=None)
    return ForeignSubject(path, name=name, runtime=choice.runtime, threads=threads)


def _open_deployed(path: Path, *, name: str, runtime: str, threads: int | None, tasks: int | None) -> Subject:
    return DeployedSubject(Artifact.open(path), name=name, runtime=runtime, threads=threads, tasks=tasks)


def _open_engine(choice: Choice, *, name: str, threads: int | None, tasks: int | None) -> Subject:
    """Load an engine through the artifact that it belongs to."""
    card = read_engine_card(choice.path)
    if choice.runtime not in (AUTO, card.runtime):
        raise SpecError(f"{choice.path}: was built for runtime '{card.runtime}', not '{choice.runtime}'")
    if misfit := engine_misfit(card):
        raise EngineIncompatibleError(f"{choice.path}: does not fit this machine: {misfit}")
    artifact = artifact_of_engine(choice.path, card)
    gpu = find_gpu()
    if gpu is not None and (taken := find_engine(artifact, card.runtime, gpu).path).name != choice.path.name:
        raise EngineIncompatibleError(
            f"{choice.path}: {card.runtime} takes the newer {taken.name} of the same graph here; move that one away to "
            "measure this one"
        )
    return DeployedSubject(artifact, name=name, runtime=card.runtime, threads=threads, tasks=tasks)
