"""What a path holds, as a report for people and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpdeploy.bundle import Bundle, is_bundle
from vpdeploy.document import Document
from vpdeploy.errors import BundleError
from vpdeploy.folded import FoldedCard
from vpdeploy.onnxfile import read_metadata
from vpdeploy.promptset import FORMAT as PROMPT_SET_FORMAT
from vpdeploy.task import RUN_FORMAT, TaskCard


def inspect_path(path: Path) -> dict[str, Any]:
    """Return what a run, a bundle, a compiled prompt set or a folded ONNX file says of itself.

    Raises:
        BundleError: The path is none of these, or is damaged.
    """
    if is_bundle(path):
        return _inspect_bundle(path)
    if (path / "task.json").is_file():
        return _inspect_card(path)
    if path.is_file() and path.suffix == ".onnx":
        return _inspect_folded(path)
    state = "does not exist" if not path.exists() else "is none of these"
    raise BundleError(f"{path}: {state}; expected a run folder, a bundle folder or an .onnx file of vpdeploy export")


def render_text(report: dict[str, Any], indent: str = "") -> str:
    """Render a report as indented lines; long lists are cut."""
    lines = []
    for key, value in report.items():
        title = key.replace("_", " ")
        if isinstance(value, dict) and value:
            lines += [f"{indent}{title}:", render_text(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{title}:")
            for item in value:
                lines.append(f"{indent}  - " + ", ".join(f"{name} {_short(each)}" for name, each in item.items()))
        else:
            lines.append(f"{indent}{title}: {_short(value)}")
    return "\n".join(lines)


def _inspect_bundle(path: Path) -> dict[str, Any]:
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    graph = bundle.verified_graph()
    tasks = []
    for name, entry in manifest.tasks.items():
        prompt_set = bundle.read_task(name)
        details, sizes = prompt_set.card.details, prompt_set.sizes()
        tasks.append(
            {
                "name": name,
                "version": entry.version,
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
        "graph": {
            "file": graph.name,
            "size_bytes": graph.stat().st_size,
            "precision": manifest.precision,
            "opset": manifest.opset,
            "sha256": manifest.graph_sha256,
        },
        "backbone": manifest.backbone.to_fields(),
        "preprocessing": manifest.preprocessing.to_fields(),
        "layout": {
            "family": manifest.layout.family,
            "digest": manifest.layout.digest,
            "tensors": {spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in manifest.layout.tensors},
        },
        "tasks": tasks,
    }


def _inspect_card(path: Path) -> dict[str, Any]:
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


def _inspect_folded(path: Path) -> dict[str, Any]:
    from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend

    card = FoldedCard.from_metadata(read_metadata(path), source=str(path))
    backend = OrtBackend(path, provider=CPU_PROVIDER, threads=1, reason="inspection")
    input_dtype = str(backend.input_dtype)
    backend.close()
    return {
        "kind": "folded model",
        "path": str(path),
        "size_bytes": path.stat().st_size,
        "precision": card.precision,
        "opset": card.opset,
        "input": "image uint8 [B, H, W, 3]" if input_dtype == "uint8" else "image float32 [B, 3, H, W], normalised",
        **_card_fields(card.task),
    }


def _card_fields(card: TaskCard) -> dict[str, Any]:
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


def _section(details: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of a card's free-form details, empty where there is none."""
    section = details.get(name)
    return section if isinstance(section, dict) else {}


def _short(value: Any) -> str:
    """Return a value as text of bounded length."""
    if isinstance(value, list):
        shown = ", ".join(_short(item) for item in value[:12])
        return f"[{shown}{f', ... {len(value)} in all' if len(value) > 12 else ''}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(each)}" for name, each in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
