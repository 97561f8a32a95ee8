"""The engines of a graph, and whether each fits this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpdeploy.engines.plan import EngineCard
from vpdeploy.engines.store import CARD_SUFFIX, FoundEngine, engine_damage, fits, list_engines
from vpdeploy.engines.toolkit import TOOLKITS, is_installed, load_toolkit
from vpdeploy.errors import BundleCorruptError, BundleError, EngineIncompatibleError, MissingExtraError, VpdeployError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import is_bundle
from vpdeploy.format.document import Document
from vpdeploy.machine import find_gpu, gpu_obstacle
from vpdeploy.text import shell_path


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What an engine is, and whether it loads here.

    Attributes:
        file: The name of the engine's file.
        card: The engine's sidecar; None where it cannot be read.
        misfit: Why the engine does not load here, or why its sidecar cannot be read; None if it loads.
        is_damaged: Whether its files are not those that were written.
    """

    file: str
    card: EngineCard | None
    misfit: str | None
    is_damaged: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form; those of the sidecar are left out where it cannot be read."""
        verdict = {"fits": self.misfit is None, "reason": self.misfit}
        if self.card is None:
            return {"file": self.file, **verdict}
        return {
            "file": self.file,
            "runtime": self.card.runtime,
            "runtime_version": self.card.runtime_version,
            "targets": list(self.card.targets),
            "gpu_name": self.card.gpu_name,
            "precision": self.card.precision,
            "profile": {axis: str(each) for axis, each in self.card.profile.ranges.items()},
            "size_bytes": self.card.size_bytes,
            **verdict,
        }


def describe_engines(artifact: Artifact) -> tuple[EngineReport, ...]:
    """Return one report for each engine beside a graph; engines of other graphs in the folder are left out."""
    reports = []
    for path, card in list_engines(artifact):
        if isinstance(card, str):
            reports.append(EngineReport(file=path.name, card=None, misfit=card, is_damaged=True))
        elif card.graph_sha256 == artifact.sha256:
            reports.append(describe_engine(path, card))
    return tuple(reports)


def describe_engine(path: Path, card: EngineCard) -> EngineReport:
    """Return what an engine is, and whether it is whole and loads here; all of its bytes are read."""
    if damage := engine_damage(FoundEngine(path=path, card=card)):
        misfit = f"{damage}; run vpdeploy build again, as it was run for {card.place}"
        return EngineReport(file=path.name, card=card, misfit=misfit, is_damaged=True)
    return EngineReport(file=path.name, card=card, misfit=engine_misfit(card))


def engine_misfit(card: EngineCard) -> str | None:
    """Return why an engine does not load on this machine, or None if it does."""
    if card.runtime not in TOOLKITS:
        return f"unknown runtime '{card.runtime}'"
    spec = TOOLKITS[card.runtime]
    if not is_installed(card.runtime):
        return str(MissingExtraError(spec.module, spec.extra))
    gpu = find_gpu()
    if gpu is None:
        return gpu_obstacle() or "no NVIDIA GPU is visible"
    try:
        return fits(card, gpu, load_toolkit(card.runtime).version)
    except VpdeployError as error:
        return str(error)


def read_sidecar(path: Path) -> EngineCard:
    """Read the sidecar of an engine file, which itself may be damaged.

    Raises:
        BundleError: The engine does not exist.
        BundleCorruptError: The engine's sidecar is missing or damaged.
    """
    if not path.is_file():
        raise BundleError(f"{path}: does not exist; vpdeploy build writes engines")
    sidecar = path.with_suffix(CARD_SUFFIX)
    if not sidecar.is_file():
        raise BundleCorruptError(
            f"{path}: its sidecar {sidecar.name} is missing, which says what it is; put it back or run vpdeploy build"
        )
    return EngineCard.from_document(Document.read(sidecar))


def read_engine_card(path: Path) -> EngineCard:
    """Read the sidecar of an engine file that is to be run.

    Raises:
        BundleError: The engine does not exist.
        BundleCorruptError: The engine's sidecar is missing or damaged, or belongs to another engine.
    """
    card = read_sidecar(path)
    if (found := path.stat().st_size) != card.size_bytes:
        raise BundleCorruptError(f"{path}: should have {card.size_bytes} bytes, found {found}; build it again")
    return card


def artifact_of_engine(path: Path, card: EngineCard) -> Artifact:
    """Return the graph that an engine was built from: the bundle, or the ONNX file, that its folder lies beside.

    Raises:
        EngineIncompatibleError: It is not there any more.
    """
    home = path.absolute().parent.parent
    if is_bundle(home):
        artifact = Artifact.open(home)
        if artifact.sha256 == card.graph_sha256:
            return artifact
        raise EngineIncompatibleError(
            f"{path}: was built from another graph than {home} holds now; run: vpdeploy build {shell_path(home)} "
            f"--runtime {card.runtime}"
        )
    for candidate in sorted(home.glob("*.onnx")):
        if sha256_of_file(candidate) == card.graph_sha256:
            return Artifact.open(candidate)
    raise EngineIncompatibleError(
        f"{path}: none of the .onnx files in {home} is the graph it was built from; put it back or build again"
    )
