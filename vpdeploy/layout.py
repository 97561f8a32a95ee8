"""The layout of a compiled prompt set: names, shapes and dtypes of its tensors.

Two prompt sets with the same layout digest can be switched in one graph. The names of graph inputs, outputs and dynamic
axes are defined here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpdeploy.document import Document
from vpdeploy.errors import BundleCorruptError, LayoutMismatchError
from vpdeploy.tensorfile import Tensors

IMAGE = "image"
SLOT = "slot"
LOGITS = "logits"

BATCH_AXIS = "batch"
SLOT_AXIS = "slots"
PREFIX_AXIS = "prefix"
CLASS_AXIS = "classes"

MASKED = -30000.0
"""The "-inf" of padding: finite and within float16, far below any logit, so that its softmax weight is exactly 0."""

PREFIX_MULTIPLE = 8
"""Prefix lengths in a table are padded to a multiple of this, for aligned GPU kernels."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a compiled prompt set, and one table input of the switchable graph.

    Attributes:
        name: Name of the tensor and of the graph input.
        shape: Sizes of one prompt set's tensor; a name stands for a size that differs between prompt sets. In a table
            the slot axis S comes first.
        dtype: NumPy dtype name, ``float32`` or ``float16``.
        padding: The value that fills a shorter prompt set up to the table's size.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    padding: float = 0.0

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "padding": self.padding}

    def resolve(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape with named sizes replaced by numbers."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a compiled prompt set, in the order of the graph's inputs."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def for_prefix(cls, *, depth: int, heads: int, head_width: int, width: int, dtype: str) -> Layout:
        """Return the layout of prefix prompt sets (VPT-deep, E²VPT).

        Args:
            depth: Blocks, L.
            heads: Attention heads, H.
            head_width: Width of a head, d.
            width: Token width, D.
            dtype: Of the keys and values; bias and head are always float32.
        """
        key_shape = (depth, heads, PREFIX_AXIS, head_width)
        return cls(
            tensors=(
                TensorSpec(name="prefix_key", shape=key_shape, dtype=dtype),
                TensorSpec(name="prefix_value", shape=key_shape, dtype=dtype),
                TensorSpec(name="prefix_bias", shape=(depth, PREFIX_AXIS), dtype="float32", padding=MASKED),
                TensorSpec(name="head_weight", shape=(width, CLASS_AXIS), dtype="float32"),
                TensorSpec(name="head_bias", shape=(CLASS_AXIS,), dtype="float32", padding=MASKED),
            )
        )

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 over the canonical JSON form; equal digest = hot-swappable."""
        canonical = json.dumps([spec.to_fields() for spec in self.tensors], separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form, the digest included."""
        return {"tensors": [spec.to_fields() for spec in self.tensors], "digest": self.digest}

    @classmethod
    def from_document(cls, document: Document) -> Layout:
        """Read the JSON form.

        Raises:
            BundleCorruptError: A field is missing or of another type, or the digest does not match.
        """
        specs = []
        for index, fields in enumerate(document.take_list("tensors", dict)):
            entry = Document(f"{document.source}: tensors[{index}]", fields)
            shape = entry.take("shape", list)
            dtype = entry.take("dtype", str)
            if not all(isinstance(size, (int, str)) for size in shape) or dtype not in ("float32", "float16"):
                raise BundleCorruptError(f"{entry.source}: impossible shape {shape} or dtype '{dtype}'")
            specs.append(
                TensorSpec(
                    name=entry.take("name", str),
                    shape=tuple(shape),
                    dtype=dtype,
                    padding=entry.take("padding", float),
                )
            )
        layout = cls(tensors=tuple(specs))
        if layout.digest != document.take("digest", str):
            raise BundleCorruptError(f"{document.source}: the digest does not match the tensors listed")
        return layout

    def sizes_of(self, tensors: Tensors, *, source: str) -> dict[str, int]:
        """Check one prompt set's tensors against the layout and return its named sizes.

        Args:
            tensors: The prompt set's tensors by name, shapes as in ``TensorSpec.shape``.
            source: What to call the prompt set in an error.

        Returns:
            A number for every named size, e.g. ``{"prefix": 15, "classes": 10}``.

        Raises:
            LayoutMismatchError: A tensor is missing, superfluous, of another shape or dtype, or holds values that
                are not finite.
        """
        expected = {spec.name for spec in self.tensors}
        if expected != set(tensors):
            raise LayoutMismatchError(
                f"{source}: expected tensors {sorted(expected)}, found {sorted(tensors)}; export the run again"
            )
        sizes: dict[str, int] = {}
        for spec in self.tensors:
            array = tensors[spec.name]
            fits = array.ndim == len(spec.shape) and array.dtype == np.dtype(spec.dtype)
            if fits:
                for size, found in zip(spec.shape, array.shape, strict=True):
                    fits &= found == (sizes.setdefault(size, found) if isinstance(size, str) else size)
            if not fits:
                raise LayoutMismatchError(
                    f"{source}: '{spec.name}' should be {spec.dtype} {list(spec.shape)}, "
                    f"found {array.dtype} {list(array.shape)}; export the run again for this bundle"
                )
            if not np.isfinite(array).all():
                raise LayoutMismatchError(f"{source}: '{spec.name}' holds values that are not finite")
        return sizes
