"""What an exported graph is, with the facts that the export recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.format.artifact import Artifact
from vpdeploy.format.datafile import DataFile
from vpdeploy.format.graphfacts import Precision

NOT_RECORDED = "not recorded"

_RECORDED = ("nodes", "parameters", "initializer_bytes", "elements", "macs_per_image", "operators", "blocks")
"""Facts that ``vpdeploy export`` counts; files of older versions lack them."""

_KNOWN_SECTIONS = ("graph", "precision")


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """An exported graph.

    Attributes:
        file: Name of the ONNX file.
        size_bytes: Size of the ONNX file, in bytes; 0 where it is missing.
        data: The file that holds its weights; None where the ONNX file does.
        precision: Type of the weights and matrix products.
        opset: ONNX opset.
        sha256: Digest of the ONNX file.
        recorded: What the export recorded for people, by name, in whatever form it did: counts, operators, the
            precision block by block. ``NOT_RECORDED`` stands for a fact that an older export did not count.
    """

    file: str
    size_bytes: int
    data: DataFile | None
    precision: Precision
    opset: int
    sha256: str
    recorded: Mapping[str, Any]

    @classmethod
    def of(cls, artifact: Artifact) -> GraphReport:
        """Return what an artifact's graph is."""
        details = artifact.graph.details
        return cls(
            file=artifact.graph_path.name,
            size_bytes=artifact.graph_path.stat().st_size if artifact.graph_path.is_file() else 0,
            data=artifact.data,
            precision=artifact.precision,
            opset=artifact.opset,
            sha256=artifact.sha256,
            recorded={
                **_counts(details.get("graph")),
                **({} if artifact.precision == "fp32" else _islands(details.get("precision"))),
                **{name: section for name, section in details.items() if name not in _KNOWN_SECTIONS},
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        data = self.data
        return {
            "file": self.file,
            "size_bytes": self.size_bytes,
            "external_data": None if data is None else {"file": data.name, "size_bytes": data.size_bytes},
            "precision": self.precision,
            "opset": self.opset,
            "sha256": self.sha256,
            **self.recorded,
        }


def _counts(facts: Any) -> dict[str, Any]:
    """Return what the export counted."""
    known = facts if isinstance(facts, dict) else {}
    return {name: known.get(name, NOT_RECORDED) for name in _RECORDED}


def _islands(precision: Any) -> dict[str, Any]:
    """Return which parts of a narrow graph stay float32, and the probe that decided it."""
    if not isinstance(precision, dict):
        return {"float32_parts": NOT_RECORDED}
    rest = {name: value for name, value in precision.items() if name not in ("type", "float32")}
    return {"float32_parts": precision.get("float32", NOT_RECORDED), **rest}
