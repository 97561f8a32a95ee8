"""What a path holds, and what can run it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from vpdeploy.backends import RUNTIMES
from vpdeploy.engines.plan import EngineCard
from vpdeploy.errors import BundleError, VpdeployError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import is_bundle
from vpdeploy.format.document import Document
from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.layout import Layout
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy.format.promptset import FORMAT as PROMPT_SET_FORMAT
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.format.run import FORMAT as RUN_FORMAT
from vpdeploy.format.run import RunCard
from vpdeploy.format.task import BackboneId, TaskCard
from vpdeploy.inspection.engines import EngineReport, describe_engine, describe_engines, read_engine_card
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
    """

    path: Path
    graph: GraphReport
    backbone: BackboneId
    preprocessing: Preprocessing
    layout: Layout
    tasks: tuple[TaskReport, ...]
    host: HostReport

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
    """

    path: Path
    input: str
    graph: GraphReport
    card: TaskCard
    host: HostReport

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "kind": "folded model",
            "path": str(self.path),
            "input": self.input,
            "graph": self.graph.to_json(),
            **_card_fields(self.card),
            **self.host.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class CardReport:
    """A run, or a compiled prompt set inside a bundle; both describe a task.

    Attributes:
        kind: Which of the two it is.
        path: The run's or prompt set's folder.
        card: What is known of the task.
        files: Size of each file in the folder, in bytes, by name.
    """

    kind: Literal["run", "compiled prompt set"]
    path: Path
    card: TaskCard
    files: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            **_card_fields(self.card),
            "files_bytes": dict(self.files),
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
        }


Inspection = BundleReport | FoldedReport | CardReport | EngineFileReport


def inspect_path(path: Path) -> Inspection:
    """Return what a run, a bundle, a compiled prompt set, a folded ONNX file or an engine is, and what runs it here.

    Raises:
        BundleError: The path is none of these, or is damaged.
    """
    if is_bundle(path):
        return _inspect_bundle(path)
    if (path / "task.json").is_file():
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
    artifact = Artifact.open(path)
    layout = artifact.layout
    assert layout is not None  # of a bundle's folder
    return BundleReport(
        path=path,
        graph=GraphReport.of(artifact),
        backbone=artifact.backbone,
        preprocessing=artifact.preprocessing,
        layout=layout,
        tasks=tuple(
            TaskReport.of(artifact.read_prompt_set(name), version) for name, version in artifact.versions.items()
        ),
        host=HostReport.of(artifact),
    )


def _inspect_folded(path: Path) -> FoldedReport:
    artifact = Artifact.open(path)
    (card,) = artifact.cards.values()
    return FoldedReport(
        path=path,
        input=_INPUTS[artifact.image_input],
        graph=GraphReport.of(artifact),
        card=card,
        host=HostReport.of(artifact),
    )


def _inspect_card(path: Path) -> CardReport:
    document = Document.read(path / "task.json")
    kind = document.take("format", str)
    if kind not in (RUN_FORMAT, PROMPT_SET_FORMAT):
        raise BundleError(f"{path / 'task.json'}: unknown format '{kind}'")
    document.expect_format(kind, 1)
    return CardReport(
        kind="run" if kind == RUN_FORMAT else "compiled prompt set",
        path=path,
        card=TaskCard.from_document(document.nested("task")),
        files={file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()},
    )


def _inspect_engine(path: Path) -> EngineFileReport:
    card = read_engine_card(path)
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


def _tensor_text(dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"{dtype} {list(shape)}"
