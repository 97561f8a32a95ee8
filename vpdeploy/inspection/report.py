"""What a path holds, and what can run it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from vpdeploy.backends import RUNTIMES
from vpdeploy.engines.plan import EngineCard
from vpdeploy.errors import BundleError, LayoutMismatchError, VpdeployError
from vpdeploy.files import sha256_of_file
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, is_bundle
from vpdeploy.format.datafile import data_file_of
from vpdeploy.format.document import Document
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.layout import Layout
from vpdeploy.format.manifest import TASKS_FOLDER
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import FORMAT as PROMPT_SET_FORMAT
from vpdeploy.format.promptset import FORMAT_VERSION as PROMPT_SET_VERSION
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.run import CARD_FILE, RunCard
from vpdeploy.format.run import FORMAT as RUN_FORMAT
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy.inspection.engines import EngineReport, describe_engine, describe_engines, read_sidecar
from vpdeploy.inspection.graph import GraphReport
from vpdeploy.machine import Machine, describe_machine

WORKS = "works"

_INPUTS: Final[dict[ImageInput, str]] = {
    "uint8": "image uint8 [B, H, W, 3]",
    "float": "image float32 [B, 3, H, W], normalised",
}


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """What there is here to run a graph.

    Attributes:
        engines: The engines that were built from the graph.
        runtimes: ``works``, or why not, for each runtime by name.
        machine: This machine.
    """

    engines: tuple[EngineReport, ...]
    runtimes: Mapping[str, str]
    machine: Machine

    @classmethod
    def of(cls, artifact: Artifact) -> HostReport:
        """Return what runs an artifact here; no graph and no engine is loaded."""
        return cls(
            engines=describe_engines(artifact),
            runtimes={name: _obstacle(artifact, name) or WORKS for name in RUNTIMES},
            machine=describe_machine(),
        )

    @property
    def damage(self) -> tuple[str, ...]:
        """What is wrong with the engines' files."""
        return tuple(_text(engine.misfit) for engine in self.engines if engine.is_damaged)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "engines": [engine.to_json() for engine in self.engines],
            "runtimes": dict(self.runtimes),
            "machine": self.machine.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """One task of a bundle.

    Attributes:
        name: The task's name.
        version: The version that is served.
        method: How its prompts were learned.
        classes: How many classes it tells apart.
        prefix: Prefix columns of its longest block.
        generated: Generated prompts of its longest block.
        size_bytes: Size of its compiled prompt set, in bytes.
        val_accuracy: Accuracy on the validation images, as training recorded it; None where it did not.
        parity: What the export's comparison recorded; empty where it did not.
    """

    name: str
    version: int
    method: str
    classes: int
    prefix: int
    generated: int
    size_bytes: int
    val_accuracy: Any
    parity: Mapping[str, Any]

    @classmethod
    def of(cls, prompt_set: CompiledPromptSet, version: int) -> TaskReport:
        """Return what a prompt set is."""
        card, sizes = prompt_set.card, prompt_set.sizes()
        return cls(
            name=card.name,
            version=version,
            method=card.method,
            classes=len(card.labels),
            prefix=sizes.get("prefix", 0),
            generated=sizes.get("generated", 0),
            size_bytes=prompt_set.size_bytes,
            val_accuracy=_section(card.details, "metrics").get("val_accuracy"),
            parity=_section(card.details, "parity"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "name": self.name,
            "version": self.version,
            "method": self.method,
            "classes": self.classes,
            "prefix": self.prefix,
            "generated": self.generated,
            "size_bytes": self.size_bytes,
            "val_accuracy": self.val_accuracy,
            "parity": dict(self.parity),
        }


@dataclass(frozen=True, kw_only=True)
class DamagedTask:
    """One task of a bundle that cannot be read.

    Attributes:
        name: The task's name.
        version: The version that should be served.
        damage: What is wrong with its files.
    """

    name: str
    version: int
    damage: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {"name": self.name, "version": self.version, "damage": self.damage}


@dataclass(frozen=True, kw_only=True)
class BundleReport:
    """A bundle.

    Attributes:
        path: The bundle's folder.
        graph: The graph that all tasks share.
        backbone: The frozen ViT.
        preprocessing: How images are brought to the backbone's input.
        layout: The layout of its prompt sets.
        tasks: The bundle's tasks, in the order of their slots.
        host: What there is here to run it.
        damage: What is wrong with its files, of the versions that are kept too; empty where all are as they were
            written.
    """

    path: Path
    graph: GraphReport
    backbone: BackboneId
    preprocessing: Preprocessing
    layout: Layout
    tasks: tuple[TaskReport | DamagedTask, ...]
    host: HostReport
    damage: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, str]:
        """Type and shape of each tensor of the layout, by name."""
        return {spec.name: _tensor_text(spec.dtype, spec.shape) for spec in self.layout.tensors}

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "kind": "bundle",
            "path": str(self.path),
            "graph": self.graph.to_json(),
            "backbone": self.backbone.to_fields(),
            "preprocessing": self.preprocessing.to_fields(),
            "layout": {"family": self.layout.family, "digest": self.layout.digest, "tensors": self.tensors},
            "tasks": [task.to_json() for task in self.tasks],
            **self.host.to_json(),
            "damage": list(self.damage),
        }


@dataclass(frozen=True, kw_only=True)
class FoldedReport:
    """A folded model.

    Attributes:
        path: The ONNX file.
        input: What the graph takes for images.
        graph: The graph.
        card: What is known of the task.
        host: What there is here to run it.
        damage: What is wrong with its files; empty where all are as they were written.
    """

    path: Path
    input: str
    graph: GraphReport
    card: TaskCard
    host: HostReport
    damage: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "kind": "folded model",
            "path": str(self.path),
            "input": self.input,
            "graph": self.graph.to_json(),
            **_card_fields(self.card),
            **self.host.to_json(),
            "damage": list(self.damage),
        }


@dataclass(frozen=True, kw_only=True)
class CardReport:
    """A run, or a compiled prompt set inside a bundle; both describe a task.

    Attributes:
        kind: Which of the two it is.
        path: The run's or prompt set's folder.
        card: What is known of the task.
        files: Size of each file in the folder, in bytes, by name.
        is_checked: Whether the files' digests are recorded: not by runs of format version 1, nor outside a bundle.
        damage: What is wrong with its files; empty where all are as they were written, or not checked.
    """

    kind: Literal["run", "compiled prompt set"]
    path: Path
    card: TaskCard
    files: Mapping[str, int]
    is_checked: bool
    damage: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            **_card_fields(self.card),
            "files_bytes": dict(self.files),
            "checked": self.is_checked,
            "damage": list(self.damage),
        }


@dataclass(frozen=True, kw_only=True)
class EngineFileReport:
    """An engine file.

    Attributes:
        path: The file.
        engine: What it is, and whether it loads here.
        card: The engine's sidecar.
        machine: This machine.
    """

    path: Path
    engine: EngineReport
    card: EngineCard
    machine: Machine

    @property
    def damage(self) -> tuple[str, ...]:
        """What is wrong with its files; empty where all are as they were written."""
        return (_text(self.engine.misfit),) if self.engine.is_damaged else ()

    @property
    def inputs(self) -> dict[str, str]:
        """Type and shape of each input, by name."""
        return {name: _tensor_text(each.dtype, each.shape) for name, each in self.card.inputs.items()}

    @property
    def outputs(self) -> dict[str, str]:
        """Type and shape of each output, by name."""
        return {name: _tensor_text(each.dtype, each.shape) for name, each in self.card.outputs.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "kind": "engine",
            "path": str(self.path),
            **self.engine.to_json(),
            "platform": self.card.platform,
            "options": self.card.options.to_fields(),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "graph_sha256": self.card.graph_sha256,
            "layout_digest": self.card.layout_digest,
            "sha256": self.card.sha256,
            "build_seconds": self.card.build_seconds,
            "machine": self.machine.to_json(),
            "damage": list(self.damage),
        }


Inspection = BundleReport | FoldedReport | CardReport | EngineFileReport


def inspect_path(path: Path) -> Inspection:
    """Return what a run, a bundle, a compiled prompt set, a folded ONNX file or an engine is, and what runs it here.

    Files are compared with their recorded digests. What is damaged is told in the report, beside all that is not.

    Raises:
        BundleError: The path is none of these, or the file that says what it is, is damaged.
    """
    if is_bundle(path):
        return _inspect_bundle(path)
    if (path / CARD_FILE).is_file():
        return _inspect_card(path)
    if path.is_file() and path.suffix == ".onnx":
        return _inspect_folded(path)
    if path.is_file() and path.suffix == ".engine":
        return _inspect_engine(path)
    state = "does not exist" if not path.exists() else "is none of these"
    raise BundleError(
        f"{path}: {state}; expected a run folder, a bundle folder, an .onnx file of vpdeploy export or an .engine file "
        "of vpdeploy build"
    )


def shown_details(card: TaskCard) -> dict[str, Any]:
    """Return what training and export recorded of a task; of a pruning's candidates, those that were compared."""
    details = {name: value for name, value in card.details.items() if name != "pruning"}
    if pruning := _section(card.details, "pruning"):
        details["pruning"] = {"chosen": pruning.get("chosen"), "candidates": pruning.get("candidates")}
    return details


def _inspect_bundle(path: Path) -> BundleReport:
    bundle = Bundle.open(path)
    report = _describe_bundle(bundle)
    if report.damage and Bundle.open(path).manifest != bundle.manifest:  # it was replaced while it was read
        return _inspect_bundle(path)
    return report


def _describe_bundle(bundle: Bundle) -> BundleReport:
    artifact, manifest = Artifact.of_manifest(bundle), bundle.manifest
    damage = []
    try:
        bundle.verified_graph()
    except BundleError as error:
        damage.append(str(error))
    tasks = []
    for name in bundle.tasks:
        task = _inspect_task(bundle, name)
        tasks.append(task)
        damage += [task.damage] if isinstance(task, DamagedTask) else []
        damage += _damaged_versions(bundle, name)
    host = HostReport.of(artifact)
    return BundleReport(
        path=bundle.path,
        graph=GraphReport.of(artifact),
        backbone=artifact.backbone,
        preprocessing=artifact.preprocessing,
        layout=manifest.layout,
        tasks=tuple(tasks),
        host=host,
        damage=(*damage, *host.damage),
    )


def _inspect_task(bundle: Bundle, name: str) -> TaskReport | DamagedTask:
    version = bundle.versions[name]
    try:
        return TaskReport.of(bundle.read_task(name), version)
    except (BundleError, LayoutMismatchError) as error:
        return DamagedTask(name=name, version=version, damage=str(error))


def _damaged_versions(bundle: Bundle, name: str) -> list[str]:
    """Return what is wrong with the versions of a task that are kept and not served: a roll-back may want them."""
    entry = bundle.manifest.entry(name)
    found = []
    for version in sorted(entry.files.keys() - {entry.version}):
        manifest = bundle.manifest.with_task(name, replace(entry, version=version))
        try:
            Bundle(bundle.path, manifest).read_task(name)
        except (BundleError, LayoutMismatchError) as error:
            found.append(str(error))
    return found


def _inspect_folded(path: Path) -> FoldedReport:
    card, data = FoldedCard.read(path), data_file_of(path)
    artifact = Artifact.of_folded(path, card, data=data)
    damage = []
    try:
        if data is not None:
            data.verify(path.parent)
    except BundleError as error:
        damage.append(str(error))
    host = HostReport.of(artifact)
    return FoldedReport(
        path=path,
        input=_INPUTS[artifact.image_input],
        graph=GraphReport.of(artifact),
        card=card.task,
        host=host,
        damage=(*damage, *host.damage),
    )


def _inspect_card(path: Path) -> CardReport:
    document = Document.read(path / CARD_FILE)
    kind = document.take("format", str)
    if kind not in (RUN_FORMAT, PROMPT_SET_FORMAT):
        raise BundleError(f"{path / CARD_FILE}: unknown format '{kind}'")
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    if kind == RUN_FORMAT:
        run = RunCard.read(path)
        found = [run.damage(name) for name in run.digests]
        return CardReport(
            kind="run",
            path=path,
            card=run.task,
            files=files,
            is_checked=bool(run.digests),
            damage=tuple(each for each in found if each is not None),
        )
    document.expect_format(kind, PROMPT_SET_VERSION)
    card = TaskCard.from_document(document.nested("task"))
    damage = _damage_in_bundle(path)
    return CardReport(
        kind="compiled prompt set",
        path=path,
        card=card,
        files=files,
        is_checked=damage is not None,
        damage=damage or (),
    )


def _damage_in_bundle(path: Path) -> tuple[str, ...] | None:
    """Return what is wrong with a compiled prompt set, by the manifest of its bundle; None where it is in none."""
    folder = path.absolute()
    home = folder.parents[2] if len(folder.parents) > 2 else folder
    if not is_bundle(home) or folder.parent.parent.name != TASKS_FOLDER:
        return None
    entry = Bundle.open(home).manifest.tasks.get(folder.parent.name)
    if entry is None or folder.name not in map(str, entry.files):
        return None
    known = entry.files[int(folder.name)]
    return tuple(
        f"{path / name}: contents do not match the manifest's sha256; export again"
        for name, digest in known.items()
        if not (path / name).is_file() or sha256_of_file(path / name) != digest
    )


def _inspect_engine(path: Path) -> EngineFileReport:
    card = read_sidecar(path)
    return EngineFileReport(path=path, engine=describe_engine(path, card), card=card, machine=describe_machine())


def _obstacle(artifact: Artifact, runtime: str) -> str | None:
    try:
        return RUNTIMES[runtime].obstacle(artifact)
    except VpdeployError as error:  # what a runtime needs is not installed: that is its obstacle
        return str(error)


def _card_fields(card: TaskCard) -> dict[str, Any]:
    return {
        "task": card.name,
        "method": card.method,
        "labels": list(card.labels),
        "backbone": card.backbone.to_fields(),
        "preprocessing": card.preprocessing.to_fields(),
        **shown_details(card),
    }


def _section(details: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a card's free-form details, empty where there is none."""
    section = details.get(name)
    return section if isinstance(section, dict) else {}


def _text(misfit: str | None) -> str:
    return "" if misfit is None else misfit


def _tensor_text(dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"{dtype} {list(shape)}"
