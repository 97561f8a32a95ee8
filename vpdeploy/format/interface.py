"""A graph's inputs and outputs by name, as its image input and its layout decide them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.errors import BundleCorruptError
from vpdeploy.format.document import Document
from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.layout import BATCH_AXIS, CLASS_AXIS, IMAGE, LOGITS, SLOT, SLOT_AXIS, Layout


@dataclass(frozen=True, kw_only=True)
class Binding:
    """One input or output of a graph or of an engine.

    Attributes:
        dtype: NumPy dtype name, e.g. ``float16``.
        shape: A name stands for a dynamic axis.
    """

    dtype: str
    shape: tuple[int | str, ...]

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_document(cls, document: Document) -> Binding:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type.
        """
        shape = document.take("shape", list)
        if not all(isinstance(size, (int, str)) and not isinstance(size, bool) for size in shape):
            raise BundleCorruptError(f"{document.source}: impossible shape {shape}")
        return cls(dtype=document.take("dtype", str), shape=tuple(shape))


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Inputs and outputs by name, in the graph's order; a name in a shape stands for a dynamic axis."""

    inputs: Mapping[str, Binding]
    outputs: Mapping[str, Binding]

    @classmethod
    def of_switchable(cls, layout: Layout, image_input: ImageInput, image_size: int) -> Interface:
        """Return the interface of a bundle's graph: images, slots, the layout's table.

        Args:
            layout: The layout of the table's inputs.
            image_input: Form of the images.
            image_size: Side of the images, H = W, in pixels.
        """
        table = {spec.name: Binding(dtype=spec.dtype, shape=(SLOT_AXIS, *spec.shape)) for spec in layout.tensors}
        return cls(
            inputs={
                IMAGE: _image_binding(image_input, image_size),
                SLOT: Binding(dtype="int32", shape=(BATCH_AXIS,)),
                **table,
            },
            outputs={LOGITS: Binding(dtype="float32", shape=(BATCH_AXIS, CLASS_AXIS))},
        )

    @classmethod
    def of_folded(cls, classes: int, image_input: ImageInput, image_size: int) -> Interface:
        """Return the interface of a folded model: images alone.

        Args:
            classes: How many classes the one task has, C.
            image_input: Form of the images.
            image_size: Side of the images, H = W, in pixels.
        """
        return cls(
            inputs={IMAGE: _image_binding(image_input, image_size)},
            outputs={LOGITS: Binding(dtype="float32", shape=(BATCH_AXIS, classes))},
        )


def _image_binding(image_input: ImageInput, side: int) -> Binding:
    if image_input == "uint8":
        return Binding(dtype="uint8", shape=(BATCH_AXIS, side, side, 3))
    return Binding(dtype="float32", shape=(BATCH_AXIS, 3, side, side))
