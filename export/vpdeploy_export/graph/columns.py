"""What a graph's block attends to besides its tokens, as constants or as a batch's rows of the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GeneratorColumns:
    """Tensors that make a block's adaptive prompts; where the first axis is 1, they are constants.

    Attributes:
        mix: Weights that mix the n patches into T prompts, [1 or B, T, n].
        scale: What each channel of the mixed patches is multiplied by, [1 or B, 1, D].
        shift: What is added to them then, [1 or B, T, D].
        down: First layer of the feature projector, [1 or B, r, D].
        up: Its second layer, [1 or B, D, r].
        bias: What is added to the generated columns' logits, float32 [1 or B, T]; None means zero.
        eps: The eps of the LayerNorm that the generator reads; None where that is the block's own norm.
    """

    mix: Tensor
    scale: Tensor
    shift: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    eps: float | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A block's prefix and generator.

    Attributes:
        key: Prefix keys, [1 or B, H, P, d], or None.
        value: Prefix values, [1 or B, H, P, d], or None.
        bias: What is added to the prefix's logits, float32 [1 or B, P]; None means zero.
        generator: What makes further columns from the image, or None.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    generator: GeneratorColumns | None = None

    def typed_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that have the graph's type; biases are float32 in every graph."""
        for value in (self.key, self.value):
            if value is not None:
                yield value
        if self.generator is not None:
            for each in fields(self.generator):
                value = getattr(self.generator, each.name)
                if each.name != "bias" and isinstance(value, Tensor):
                    yield value


NO_COLUMNS = Columns()
