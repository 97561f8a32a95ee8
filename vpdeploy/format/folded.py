"""A folded model: one task's graph with its prompts and head as constants, described by its own metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vpdeploy.errors import BundleCorruptError, BundleError
from vpdeploy.format.document import Document, to_json
from vpdeploy.format.graphfacts import GraphFacts, ImageInput, take_details, take_precision
from vpdeploy.format.layout import IMAGE
from vpdeploy.format.onnxfile import read_graph, read_metadata
from vpdeploy.format.task import TaskCard

METADATA_KEY = "vpdeploy"
FORMAT = "vpdeploy.folded"
FORMAT_VERSION = 2
"""Version 2 records the form of the image input; of version 1 the graph itself is asked."""

_IMAGE_INPUTS: Final[dict[str, ImageInput]] = {"uint8": "uint8", "float32": "float"}
"""The forms by the element type of the graph's input."""


@dataclass(frozen=True, kw_only=True)
class FoldedCard:
    """What a folded ONNX file says of itself.

    Attributes:
        task: The task's card, the parity report included.
        graph: What is recorded of the graph.
    """

    task: TaskCard
    graph: GraphFacts

    def to_metadata(self) -> dict[str, str]:
        """Return the key-value pairs to store in the ONNX file's ``metadata_props``."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "graph": self.graph.to_fields(),
            "task": self.task.to_fields(),
        }
        return {METADATA_KEY: to_json(fields)}

    @classmethod
    def read(cls, path: Path) -> FoldedCard:
        """Read the metadata of an ONNX file.

        Raises:
            BundleError: The file cannot be read, or was not written by ``vpdeploy export``.
            BundleCorruptError: The metadata are damaged.
            BundleVersionError: They were written in another format version.
        """
        metadata = read_metadata(path)
        if METADATA_KEY not in metadata:
            raise BundleError(f"{path}: no vpdeploy metadata; expected a file written by vpdeploy export")
        document = Document.parse(metadata[METADATA_KEY], source=f"{path}: metadata")
        version = document.expect_format(FORMAT, 1, FORMAT_VERSION)
        return cls(
            task=TaskCard.from_document(document.nested("task")),
            graph=_facts_of_version_1(document, path)
            if version == 1
            else GraphFacts.from_document(document.nested("graph")),
        )


def _facts_of_version_1(document: Document, path: Path) -> GraphFacts:
    """Read the facts of version 1; what the image input is, only the graph tells.

    Raises:
        BundleCorruptError: A field is missing or unknown, or the graph takes no images of a known form.
    """
    found = read_graph(path).inputs.get(IMAGE, "nothing")
    if found not in _IMAGE_INPUTS:
        raise BundleCorruptError(
            f"{path}: expected an input '{IMAGE}' of {' or '.join(_IMAGE_INPUTS)}, found {found}; export again"
        )
    return GraphFacts(
        precision=take_precision(document),
        opset=document.take("opset", int),
        image_input=_IMAGE_INPUTS[found],
        details=take_details(document, "graph"),
    )
