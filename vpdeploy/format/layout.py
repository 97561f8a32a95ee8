"""The layout of a compiled prompt set: names, shapes and dtypes of its tensors.

Two prompt sets with the same layout digest can be switched in one graph. The names of graph inputs, outputs and dynamic
axes are defined here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vpdeploy.errors import BundleCorruptError, LayoutMismatchError
from vpdeploy.format.document import Document
from vpdeploy.format.task import BackboneId
from vpdeploy.format.tensorfile import Tensors

IMAGE = "image"
SLOT = "slot"
LOGITS = "logits"

BATCH_AXIS = "batch"
SLOT_AXIS = "slots"
PREFIX_AXIS = "prefix"
GENERATED_AXIS = "generated"
HIDDEN_AXIS = "hidden"
CLASS_AXIS = "classes"

Family = Literal["prefix", "adaptive", "superset"]
"""``prefix``: prompts that do not depend on the image; ``adaptive``: generated ones; ``superset`` serves both."""

MASKED = -30000.0
"""The "-inf" of padding: finite and within float16, far below any logit, so that its softmax weight is exactly 0."""


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
class GeneratorSpec:
    """What the graph of an adaptive layout fixes for all its tasks.

    Attributes:
        patches: Patches in an image, n.
        eps: The epsilon of the LayerNorm through which the generators read; None where they share the block's own.
    """

    patches: int
    eps: float | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a compiled prompt set, in the order of the graph's inputs.

    Attributes:
        tensors: The tensors, one for each table input.
        generator: What an adaptive or superset layout fixes for its generators; None for a prefix layout.
    """

    tensors: tuple[TensorSpec, ...]
    generator: GeneratorSpec | None = None

    @classmethod
    def for_backbone(
        cls, backbone: BackboneId, *, dtype: str, family: Family = "prefix", generator: GeneratorSpec | None = None
    ) -> Layout:
        """Return the layout of a backbone's prompt sets.

        Args:
            backbone: The frozen ViT. Its stages give the prefix's shapes: one pair of key and value tensors for each.
            dtype: Element type of keys, values and generators; biases and heads are always float32.
            family: ``prefix`` (VPT-deep, E²VPT) has a prefix in every block; ``adaptive`` (VAPT) has one in block 0
                and generators in the others; ``superset`` has both, so that tasks of either kind share one graph.
            generator: What the adaptive families add; None for ``prefix``.
        """
        tensors: list[TensorSpec] = []
        for index, stage in enumerate(backbone.stages):
            mark = f"_{index}" if len(backbone.stages) > 1 else ""
            depth = 1 if family == "adaptive" else stage.depth
            key_shape = (depth, stage.heads, PREFIX_AXIS, stage.head_width)
            tensors += [
                TensorSpec(name=f"prefix_key{mark}", shape=key_shape, dtype=dtype),
                TensorSpec(name=f"prefix_value{mark}", shape=key_shape, dtype=dtype),
                TensorSpec(name=f"prefix_bias{mark}", shape=(depth, PREFIX_AXIS), dtype="float32", padding=MASKED),
            ]
        if generator is not None:
            depth, width = backbone.depth - 1, backbone.width
            tensors += [
                TensorSpec(name="generator_mix", shape=(depth, GENERATED_AXIS, generator.patches), dtype=dtype),
                TensorSpec(name="generator_scale", shape=(depth, width), dtype=dtype),
                TensorSpec(name="generator_shift", shape=(depth, GENERATED_AXIS, width), dtype=dtype),
                TensorSpec(name="generator_down", shape=(HIDDEN_AXIS, width), dtype=dtype),
                TensorSpec(name="generator_up", shape=(width, HIDDEN_AXIS), dtype=dtype),
                TensorSpec(name="generator_bias", shape=(depth, GENERATED_AXIS), dtype="float32", padding=MASKED),
            ]
        tensors += [
            TensorSpec(name="head_weight", shape=(backbone.width, CLASS_AXIS), dtype="float32"),
            TensorSpec(name="head_bias", shape=(CLASS_AXIS,), dtype="float32", padding=MASKED),
        ]
        return cls(tensors=tuple(tensors), generator=generator)

    @property
    def family(self) -> Family:
        """Which kinds of prompt sets the layout holds."""
        if self.generator is None:
            return "prefix"
        blocks = {spec.name: spec.shape[0] for spec in self.tensors}
        return "adaptive" if blocks["prefix_key"] == 1 else "superset"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the sizes that differ between prompt sets, in the order in which they occur."""
        return tuple(dict.fromkeys(size for spec in self.tensors for size in spec.shape if isinstance(size, str)))

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 over the canonical JSON form; equal digest = hot-swappable."""
        listed: Any = [spec.to_fields() for spec in self.tensors]
        if self.generator is not None:
            listed = {"tensors": listed, "generator": asdict(self.generator)}
        canonical = json.dumps(listed, separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON form, the digest included."""
        fields: dict[str, Any] = {"tensors": [spec.to_fields() for spec in self.tensors], "digest": self.digest}
        if self.generator is not None:
            fields["generator"] = asdict(self.generator)
        return fields

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
            if not shape or not all(map(_is_size, shape)) or dtype not in ("float32", "float16"):
                raise BundleCorruptError(f"{entry.source}: impossible shape {shape} or dtype '{dtype}'")
            specs.append(
                TensorSpec(
                    name=entry.take("name", str),
                    shape=tuple(shape),
                    dtype=dtype,
                    padding=entry.take("padding", float),
                )
            )
        layout = cls(tensors=tuple(specs), generator=_generator_spec(document))
        if layout.generator is not None and "prefix_key" not in {spec.name for spec in specs}:
            raise BundleCorruptError(f"{document.source}: a generator and no tensor 'prefix_key' beside it")
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


def _is_size(size: Any) -> bool:
    """Tell whether a size of a shape is a name or a number from 0."""
    return isinstance(size, str) or (isinstance(size, int) and not isinstance(size, bool) and size >= 0)


def _generator_spec(document: Document) -> GeneratorSpec | None:
    if "generator" not in document.fields:
        return None
    entry = document.nested("generator")
    eps = None if entry.fields.get("eps") is None else entry.take("eps", float)
    return GeneratorSpec(patches=entry.take("patches", int), eps=eps)
