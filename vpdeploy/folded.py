"""A folded model: one task's graph with its prompts and head as constants, described by its own metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpdeploy.document import Document, to_json
from vpdeploy.errors import BundleError
from vpdeploy.manifest import Precision, take_precision
from vpdeploy.task import TaskCard

METADATA_KEY = "vpdeploy"
FORMAT = "vpdeploy.folded"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FoldedCard:
    """What a folded ONNX file says of itself.

    Attributes:
        task: The task's card, the parity report included.
        precision: Of the graph's weights and matrix products.
        opset: ONNX opset.
        graph_details: As in a bundle's manifest.
    """

    task: TaskCard
    precision: Precision
    opset: int
    graph_details: dict[str, Any] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Return the key-value pairs to store in the ONNX file's ``metadata_props``."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "precision": self.precision,
            "opset": self.opset,
            "graph": self.graph_details,
            "task": self.task.to_fields(),
        }
        return {METADATA_KEY: to_json(fields)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, source: str) -> FoldedCard:
        """Read the key-value pairs of an ONNX file.

        Raises:
            BundleError: The file was not written by ``vpdeploy export``.
            BundleCorruptError: The metadata is damaged.
            BundleVersionError: It was written in another format version.
        """
        if METADATA_KEY not in metadata:
            raise BundleError(f"{source}: no vpdeploy metadata; expected a file written by vpdeploy export")
        document = Document.parse(metadata[METADATA_KEY], source=f"{source}: metadata")
        document.expect_format(FORMAT, FORMAT_VERSION)
        return cls(
            task=TaskCard.from_document(document.nested("task")),
            precision=take_precision(document),
            opset=document.take("opset", int),
            graph_details=document.take("graph", dict) if "graph" in document.fields else {},
        )
