"""A folded model: one task's graph with its prompts and head as constants, described by its own metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.document import Document, to_json
from vpdeploy.errors import BundleError
from vpdeploy.task import TaskCard

METADATA_KEY = "vpdeploy"
FORMAT = "vpdeploy.folded"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FoldedCard:
    """What a folded ONNX file says of itself.

    Attributes:
        task: The task's card, the parity report included.
        precision: ``fp32`` or ``fp16``.
        opset: ONNX opset.
    """

    task: TaskCard
    precision: str
    opset: int

    def to_metadata(self) -> dict[str, str]:
        """Return the key-value pairs to store in the ONNX file's ``metadata_props``."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "precision": self.precision,
            "opset": self.opset,
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
            precision=document.take("precision", str),
            opset=document.take("opset", int),
        )
