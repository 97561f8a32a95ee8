"""What a path holds, as a report in JSON's types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpdeploy.artifact import Artifact
from vpdeploy.bundle import is_bundle
from vpdeploy.document import Document
from vpdeploy.errors import BundleError
from vpdeploy.inspection.engines import describe_engine, describe_engines, read_engine_card
from vpdeploy.inspection.graph import describe_graph, describe_input
from vpdeploy.inspection.runtimes import describe_runtimes
from vpdeploy.machine import describe_machine
from vpdeploy.promptset import FORMAT as PROMPT_SET_FORMAT
from vpdeploy.task import RUN_FORMAT, TaskCard

Report = dict[str, Any]


def inspect_path(path: Path) -> Report:
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


def _inspect_bundle(path: Path) -> Report:
    artifact = Artifact.open(path)
    layout = artifact.layout
    assert layout is not None  # of a bundle's folder
    tasks = []
    for name, version in artifact.versions.items():
        prompt_set = artifact.read_prompt_set(name)
        details, sizes = prompt_set.card.details, prompt_set.sizes()
        tasks.append(
            {
                "name": name,
                "version": version,
                "method": prompt_set.card.method,
                "classes": len(prompt_set.card.labels),
                "prefix": sizes.get("prefix", 0),
                "generated": sizes.get("generated", 0),
                "size_bytes": prompt_set.size_bytes,
                "val_accuracy": _section(details, "metrics").get("val_accuracy"),
                "parity": _section(details, "parity"),
            }
        )
    return {
        "kind": "bundle",
        "path": str(path),
        "graph": describe_graph(artifact),
        "backbone": artifact.backbone.to_fields(),
        "preprocessing": artifact.preprocessing.to_fields(),
        "layout": {
            "family": layout.family,
            "digest": layout.digest,
            "tensors": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in layout.tensors},
        },
        "tasks": tasks,
        **_place(artifact),
    }


def _inspect_folded(path: Path) -> Report:
    artifact = Artifact.open(path)
    (card,) = artifact.cards.values()
    return {
        "kind": "folded model",
        "path": str(path),
        "input": describe_input(artifact),
        "graph": describe_graph(artifact),
        **_card_fields(card),
        **_place(artifact),
    }


def _inspect_card(path: Path) -> Report:
    """Report a run, or a compiled prompt set inside a bundle; both describe a task."""
    document = Document.read(path / "task.json")
    kind = document.take("format", str)
    if kind not in (RUN_FORMAT, PROMPT_SET_FORMAT):
        raise BundleError(f"{path / 'task.json'}: unknown format '{kind}'")
    document.expect_format(kind, 1)
    card = TaskCard.from_document(document.nested("task"))
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    return {
        "kind": "run" if kind == RUN_FORMAT else "compiled prompt set",
        "path": str(path),
        **_card_fields(card),
        "files_bytes": files,
    }


def _inspect_engine(path: Path) -> Report:
    card = read_engine_card(path)
    bindings = {"inputs": card.inputs, "outputs": card.outputs}
    return {
        "kind": "engine",
        "path": str(path),
        **describe_engine(path, card),
        "platform": card.platform,
        "options": card.options.to_fields(),
        **{
            title: {name: f"{each.dtype} {list(each.shape)}" for name, each in named.items()}
            for title, named in bindings.items()
        },
        "graph_sha256": card.graph_sha256,
        "layout_digest": card.layout_digest,
        "sha256": card.sha256,
        "build_seconds": card.build_seconds,
        "machine": describe_machine().to_json(),
    }


def _place(artifact: Artifact) -> Report:
    """Return what there is here to run a graph: engines, runtimes, the machine."""
    return {
        "engines": describe_engines(artifact),
        "runtimes": describe_runtimes(artifact),
        "machine": describe_machine().to_json(),
    }


def _card_fields(card: TaskCard) -> Report:
    details = {name: value for name, value in card.details.items() if name != "pruning"}
    if pruning := _section(card.details, "pruning"):
        details["pruning"] = {"chosen": pruning.get("chosen"), "candidates": pruning.get("candidates")}
    return {
        "task": card.name,
        "method": card.method,
        "labels": list(card.labels),
        "backbone": card.backbone.to_fields(),
        "preprocessing": card.preprocessing.to_fields(),
        **details,
    }


def _section(details: Mapping[str, Any], name: str) -> Report:
    """Return a section of a card's free-form details, empty where there is none."""
    section = details.get(name)
    return section if isinstance(section, dict) else {}
