"""Facts about an exported graph: what the export recorded, and what the file itself tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpdeploy.datafile import DataFile, data_file_of
from vpdeploy.deployed import DeployedGraph
from vpdeploy.inspection.onnxgraph import read_onnx_graph
from vpdeploy.layout import IMAGE

NOT_RECORDED = "not recorded"

_RECORDED = ("nodes", "parameters", "initializer_bytes", "macs_per_image", "operators", "blocks")
"""Facts that ``vpdeploy export`` counts; files of older versions lack them."""

_KNOWN_SECTIONS = ("graph", "precision")

_INPUTS = {
    "uint8": "image uint8 [B, H, W, 3]",
    "float32": "image float32 [B, 3, H, W], normalised",
}


def describe_graph(graph: DeployedGraph) -> dict[str, Any]:
    """Return sizes, precision, and what the export recorded of operations and precision block by block.

    Raises:
        BundleError: The file is damaged.
    """
    bundle, folded = graph.bundle, graph.folded
    details, opset = {}, None
    if bundle is not None:
        details, opset = bundle.manifest.graph_details, bundle.manifest.opset
    elif folded is not None:
        details, opset = folded.graph_details, folded.opset
    data = _data_file(graph)
    return {
        "file": graph.path.name,
        "size_bytes": graph.path.stat().st_size,
        "external_data": None if data is None else {"file": data.name, "size_bytes": data.size_bytes},
        "precision": graph.precision,
        "opset": opset,
        "sha256": graph.sha256,
        **_recorded(details.get("graph")),
        **({} if graph.precision == "fp32" else _islands(details.get("precision"))),
        **{name: section for name, section in details.items() if name not in _KNOWN_SECTIONS},
    }


def graph_bytes(graph: DeployedGraph) -> int:
    """Return the bytes of a graph's file, and of the file beside it that holds its weights where there is one.

    Raises:
        BundleError: The file is damaged.
    """
    data = _data_file(graph)
    return graph.path.stat().st_size + (0 if data is None else data.size_bytes)


def describe_input(graph: Path) -> str:
    """Return what an ONNX file of ours takes; the file is read, not loaded into a runtime.

    Raises:
        BundleError: The file is damaged.
    """
    return _INPUTS.get(read_onnx_graph(graph).inputs.get(IMAGE, ""), "unknown")


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


def _data_file(graph: DeployedGraph) -> DataFile | None:
    """Return the file that holds the weights where the graph's own does not; a bundle's manifest knows."""
    return graph.bundle.manifest.graph_data if graph.bundle is not None else data_file_of(graph.path)
