"""From a path to a subject: which kind of artifact it is, and which runtime an engine file asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vpdeploy.backends import AUTO
from vpdeploy.bench.subject import Subject
from vpdeploy.bundle import is_bundle
from vpdeploy.errors import BundleError, EngineIncompatibleError, SpecError
from vpdeploy.folded import METADATA_KEY
from vpdeploy.onnxfile import read_metadata

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


def open_subject(choice: Choice, *, name: str, threads: int | None, tasks: int | None) -> Subject:
    """Load what a path names.

    Args:
        choice: Path and runtime.
        name: What reports call it.
        threads: CPU threads inside one run; None leaves it to the runtime.
        tasks: Slots to fill in a bundle's table; None: one for each of its tasks.

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
    from vpdeploy.bench.foreign import ForeignSubject

    return ForeignSubject(path, name=name, runtime=choice.runtime, threads=threads)


def _open_deployed(path: Path, *, name: str, runtime: str, threads: int | None, tasks: int | None) -> Subject:
    from vpdeploy.artifact import Artifact
    from vpdeploy.bench.deployed import DeployedSubject

    return DeployedSubject(Artifact.open(path), name=name, runtime=runtime, threads=threads, tasks=tasks)


def _open_engine(choice: Choice, *, name: str, threads: int | None, tasks: int | None) -> Subject:
    """Load an engine through the artifact that it belongs to."""
    from vpdeploy.bench.deployed import DeployedSubject
    from vpdeploy.engines.store import find_engine
    from vpdeploy.inspection.engines import artifact_of_engine, engine_misfit, read_engine_card
    from vpdeploy.machine import find_gpu

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
