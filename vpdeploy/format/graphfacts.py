"""What an artifact records of its ONNX graph: the same facts of a bundle's graph and of a folded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document

Precision = Literal["fp32", "fp16", "bf16"]
"""Type of a graph's weights and matrix products."""

ImageInput = Literal["uint8", "float"]
"""Form of a graph's ``image`` input: uint8 [B, H, W, 3] as decoded, or float32 [B, 3, H, W], normalised already."""


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What an artifact records of its graph.

    Attributes:
        precision: Type of the weights and matrix products.
        opset: ONNX opset.
        image_input: Form of the ``image`` input.
        details: Free-form sections for people, e.g. its size and operations, its precision block by block; nothing is
            computed from them.
    """

    precision: Precision
    opset: int
    image_input: ImageInput
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {
            "precision": self.precision,
            "opset": self.opset,
            "image_input": self.image_input,
            **({"details": dict(self.details)} if self.details else {}),
        }

    @classmethod
    def from_document(cls, document: Document) -> GraphFacts:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing, of another type, or unknown.
        """
        return cls(
            precision=take_precision(document),
            opset=document.take("opset", int),
            image_input=_take_image_input(document),
            details=take_details(document, "details"),
        )


def take_precision(document: Document) -> Precision:
    """Read the field ``precision``.

    Raises:
        BundleCorruptError: It is missing or unknown.
    """
    precision = document.take("precision", str)
    if precision not in get_args(Precision):
        raise BundleCorruptError(f"{document.source}: unknown precision '{precision}'")
    return precision  # type: ignore[return-value]


def take_details(document: Document, name: str) -> dict[str, Any]:
    """Read the sections for people under ``name``; empty where there are none.

    Raises:
        BundleCorruptError: The field is no JSON object.
    """
    return document.take(name, dict) if name in document.fields else {}


def _take_image_input(document: Document) -> ImageInput:
    found = document.take("image_input", str)
    if found not in get_args(ImageInput):
        raise BundleCorruptError(f"{document.source}: unknown image input '{found}'")
    return found  # type: ignore[return-value]
