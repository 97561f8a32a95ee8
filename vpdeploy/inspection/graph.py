"""Facts about an exported graph, as the export recorded them."""

from __future__ import annotations

from typing import Any, Final

from vpdeploy.artifact import Artifact
from vpdeploy.graphfacts import ImageInput

NOT_RECORDED = "not recorded"

_RECORDED = ("nodes", "parameters", "initializer_bytes", "elements", "macs_per_image", "operators", "blocks")
"""Facts that ``vpdeploy export`` counts; files of older versions lack them."""

_KNOWN_SECTIONS = ("graph", "precision")

_INPUTS: Final[dict[ImageInput, str]] = {
    "uint8": "image uint8 [B, H, W, 3]",
    "float": "image float32 [B, 3, H, W], normalised",
}


def describe_graph(artifact: Artifact) -> dict[str, Any]:
    """Return sizes, precision, and what the export recorded of operations and precision block by block."""
    details, data = artifact.graph.details, artifact.data
    return {
        "file": artifact.graph_path.name,
        "size_bytes": artifact.graph_path.stat().st_size,
        "external_data": None if data is None else {"file": data.name, "size_bytes": data.size_bytes},
        "precision": artifact.precision,
        "opset": artifact.opset,
        "sha256": artifact.sha256,
        **_recorded(details.get("graph")),
        **({} if artifact.precision == "fp32" else _islands(details.get("precision"))),
        **{name: section for name, section in details.items() if name not in _KNOWN_SECTIONS},
    }


def describe_input(artifact: Artifact) -> str:
    """Return what the graph takes for images."""
    return _INPUTS[artifact.image_input]


def _recorded(facts: Any) -> dict[str, Any]:
    """Return what the export counted."""
    known = facts if isinstance(facts, dict) else {}
    return {name: known.get(name, NOT_RECORDED) for name in _RECORDED}


def _islands(precision: Any) -> dict[str, Any]:
    """Return which parts of a narrow graph stay float32, and the probe that decided it."""
    if not isinstance(precision, dict):
        return {"float32_parts": NOT_RECORDED}
    rest = {name: value for name, value in precision.items() if name not in ("type", "float32")}
    return {"float32_parts": precision.get("float32", NOT_RECORDED), **rest}
