"""The engines beside a graph: which there are, which fits this machine, and whether a file is whole.

::

    engines/  KEY.engine    NVIDIA's file, complete on the disk first
              KEY.json      its sidecar, the commit point: without it the engine does not exist
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vpdeploy.engines.plan import EngineCard
from vpdeploy.engines.target import sm_number
from vpdeploy.engines.toolkit import TOOLKITS, host_platform, is_installed, load_toolkit, version_numbers
from vpdeploy.errors import (
    BuildError,
    BundleCorruptError,
    BundleError,
    EngineIncompatibleError,
    MissingExtraError,
    VpdeployError,
)
from vpdeploy.files import locked, replacing_file, sha256_of_file, storage_reason
from vpdeploy.format.artifact import ENGINE_SUFFIX, Artifact
from vpdeploy.format.document import Document, to_json
from vpdeploy.machine import Gpu, find_gpu, gpu_obstacle
from vpdeploy.text import shell_path

CARD_SUFFIX = ".json"

_NAMED = 3  # engines that one line of an error lists


@dataclass(frozen=True, kw_only=True)
class FoundEngine:
    """An engine's file and its sidecar.

    Attributes:
        path: The path of ``KEY.engine``.
        card: What ``KEY.json`` says.
    """

    path: Path
    card: EngineCard


def list_engines(artifact: Artifact) -> list[tuple[Path, EngineCard | str]]:
    """Return every engine beside a graph, sorted by name: its path, and its card or what is wrong with its files.

    Contents are not verified. Engines of other graphs are listed too: folded models in one folder share it.
    """
    folder = artifact.engines_folder
    names = {path.stem for suffix in (ENGINE_SUFFIX, CARD_SUFFIX) for path in folder.glob(f"[!.]*{suffix}")}
    return [(folder / f"{name}{ENGINE_SUFFIX}", _card_or_fault(folder, name)) for name in sorted(names)]


def fits(card: EngineCard, gpu: Gpu, runtime_version: str) -> str | None:
    """Return why an engine does not load on a GPU with a version of its runtime, or None if it does."""
    if gap := _version_gap(card, runtime_version):
        return gap
    if card.platform not in (None, host_platform()):
        return f"it was built on {card.platform}, here is {host_platform()}"
    hardware = card.options.hardware
    if hardware == "ampere+":
        fit = sm_number(gpu.sm) >= sm_number("sm_80")
    else:
        fit = gpu.sm in card.targets and (hardware != "none" or card.gpu_name in (None, gpu.name))
    return None if fit else f"it was built for {card.place}, here is {gpu.name} ({gpu.sm})"


def find_engine(artifact: Artifact, runtime: str, gpu: Gpu) -> FoundEngine:
    """Return the newest engine of a graph that a runtime can load on a GPU; its bytes are not verified.

    Raises:
        EngineIncompatibleError: There is none; the message says what there is, what is here, and the command to run.
        MissingExtraError: The runtime is not installed.
        BuildError: The runtime cannot be loaded.
    """
    version = load_toolkit(runtime).version
    fitting: list[FoundEngine] = []
    faults: list[str] = []
    for path, card in list_engines(artifact):
        if isinstance(card, str):
            faults.append(card)
        elif card.runtime == runtime:
            fault = "it belongs to another graph" if card.graph_sha256 != artifact.sha256 else fits(card, gpu, version)
            if fault is None:
                fitting.append(FoundEngine(path=path, card=card))
            else:
                faults.append(f"{path.name}: {fault}")
    if not fitting:
        raise EngineIncompatibleError(
            f"{artifact.path}: no engine for {gpu.name} ({gpu.sm}) and {runtime} {version}{_listed(faults)}; "
            f"run: {build_command(artifact, runtime)}"
        )
    return max(fitting, key=lambda found: found.path.with_suffix(CARD_SUFFIX).stat().st_mtime_ns)


def engine_obstacle(artifact: Artifact, runtime: str) -> str | None:
    """Return why a runtime has no engine that it could run here, or None; loads neither graph nor engine."""
    spec = TOOLKITS[runtime]
    if not is_installed(runtime):
        return str(MissingExtraError(spec.module, spec.extra))
    gpu = find_gpu()
    if gpu is None:
        return gpu_obstacle() or "no NVIDIA GPU is visible"
    if not any(isinstance(card, str) or card.runtime == runtime for _, card in list_engines(artifact)):
        return f"{artifact.path} has no engine for it; run: {build_command(artifact, runtime)}"
    try:
        find_engine(artifact, runtime, gpu)
    except VpdeployError as error:
        return str(error)
    return None


def verify_engine(found: FoundEngine) -> None:
    """Compare an engine's bytes with its sidecar.

    Raises:
        BundleCorruptError: The file is missing, truncated or was changed.
    """
    if damage := engine_damage(found):
        raise BundleCorruptError(f"{damage}; run vpdeploy build again, as it was run for {found.card.place}")


def engine_damage(found: FoundEngine) -> str | None:
    """Return how an engine's bytes differ from what its sidecar says, or None if they do not."""
    path, card = found.path, found.card
    try:
        size = path.stat().st_size
        digest = sha256_of_file(path)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if size < card.size_bytes:
        return f"{path}: truncated, {size} of {card.size_bytes} bytes are there"
    return None if digest == card.sha256 else f"{path}: contents do not match its sidecar's sha256"


def build_command(artifact: Artifact, runtime: str) -> str:
    """Return the command that builds an engine for this machine's GPU."""
    return f"vpdeploy build {shell_path(artifact.path)} --runtime {runtime}"


def _card_or_fault(folder: Path, name: str) -> EngineCard | str:
    engine, sidecar = folder / f"{name}{ENGINE_SUFFIX}", folder / f"{name}{CARD_SUFFIX}"
    if not sidecar.is_file():
        return f"{engine.name}: its sidecar {sidecar.name} is missing, so it is not used"
    if not engine.is_file():
        return f"{engine.name}: file is missing, only its sidecar is there"
    try:
        card = EngineCard.from_document(Document.read(sidecar))
    except BundleError as error:
        return str(error)
    if card.key != name:
        return f"{sidecar.name}: describes another engine, {card.key}"
    return card


def _version_gap(card: EngineCard, here: str) -> str | None:
    """Return why an engine's runtime version does not fit the one that is here, or None."""
    built, found = version_numbers(card.runtime_version), version_numbers(here)
    if built == found:
        return None
    if card.options.version_compatible and built < found and (built[0] == found[0] or (built[0], found[0]) == (10, 11)):
        return None
    needed = f"{card.runtime_version} or newer" if card.options.version_compatible else card.runtime_version
    return f"it needs {card.runtime} {needed}, here is {here}"


def _listed(faults: list[str]) -> str:
    if not faults:
        return ""
    more = f", and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return f" ({'; '.join(faults[:_NAMED])}{more})"


_LOCK_FILE = ".lock"


def write_engine(folder: Path, data: memoryview, card: EngineCard) -> FoundEngine:
    """Write an engine and its sidecar; both are on the disk before the first takes its place, the sidecar last.

    Raises:
        BuildError: The folder cannot be written, or the disk is full; what was there is as it was.
    """
    path = folder / f"{card.key}{ENGINE_SUFFIX}"
    try:
        with locked(folder / _LOCK_FILE):
            _remove(folder.glob(".*.partial"))  # left by a killed process: who writes holds the lock
            with replacing_file(folder / f"{card.key}{CARD_SUFFIX}") as sidecar:
                sidecar.write_text(to_json(card.to_fields()), encoding="utf-8")
                with replacing_file(path) as engine:
                    engine.write_bytes(data)
    except OSError as error:
        room = storage_reason(error)
        advice = "free some space and run" if room else "run"
        raise BuildError(
            f"{folder}: the engine ({len(data) / 1e6:.0f} MB) cannot be written, {room or error.strerror or error}; "
            f"{advice} the command again, what was there is as it was"
        ) from error
    return FoundEngine(path=path, card=card)


def leftover_engines(artifact: Artifact) -> list[Path]:
    """Return the engines of graphs that are no longer beside them, and engines without a usable sidecar.

    An engine of another ONNX file in the same folder is none of them.
    """
    listed = list_engines(artifact)
    foreign = any(isinstance(card, str) or card.graph_sha256 != artifact.sha256 for _, card in listed)
    if not foreign:
        return []
    beside = [path for path in artifact.graph_path.parent.glob("*.onnx") if path != artifact.graph_path]
    present = {artifact.sha256, *map(sha256_of_file, beside)}
    return [path for path, card in listed if isinstance(card, str) or card.graph_sha256 not in present]


def remove_engines(paths: Iterable[Path]) -> None:
    """Remove engines and what lies beside each under its name, the sidecar first.

    Raises:
        OSError: A file cannot be removed.
    """
    for path in paths:
        with locked(path.parent / _LOCK_FILE):
            _remove([path.with_name(f"{path.stem}{CARD_SUFFIX}"), *path.parent.glob(f"{path.stem}.*")])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
