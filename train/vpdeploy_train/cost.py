"""What a forward pass costs, counted: multiply-accumulates of the matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """The sizes that decide what a plain ViT costs.

    Attributes:
        depth: Number of blocks, L.
        width: Width of a token, D.
        hidden: Width of the MLP's hidden layer.
        tokens: Number of rows that a block computes, N: class token, registers and patches.
        patch_values: Numbers in a patch, 3 · patch².
        classes: Number of classes, C.
        extra_rows: How many of the N rows are no patches.
    """

    depth: int
    width: int
    hidden: int
    tokens: int
    patch_values: int
    classes: int
    extra_rows: int = 1

    @property
    def patches(self) -> int:
        """The number of patches, n."""
        return self.tokens - self.extra_rows


def macs_as_tokens(shape: ViTShape, prompts: int) -> int:
    """Count one image with ``prompts`` prompt tokens in every block; 0 prompts is the plain model."""
    blocks = shape.depth * _block_macs(shape, rows=shape.tokens + prompts, keys=shape.tokens + prompts)
    return _ends(shape) + blocks


def macs_as_prefix(shape: ViTShape, lengths: Sequence[int], *, class_token_only: bool = True) -> int:
    """Count one image with a prefix of the given length in each block.

    Args:
        shape: The backbone.
        lengths: The prefix's length, P, in each of the L blocks.
        class_token_only: Whether the last block computes row 0 only; its keys and values still come from all rows.
    """
    total = _ends(shape)
    for index, length in enumerate(lengths):
        last = class_token_only and index == shape.depth - 1
        rows = 1 if last else shape.tokens
        total += _block_macs(shape, rows=rows, keys=shape.tokens + length, projected=shape.tokens)
    return total


def macs_of_generator(shape: ViTShape, *, tokens: int, hidden: int) -> int:
    """Count what makes one block's adaptive prompts and their keys and values from one image.

    Args:
        shape: The backbone.
        tokens: Prompts, T: each mixed from n patches, passed through the feature projector, and projected twice.
        hidden: Number of hidden units of the feature projector, r.
    """
    return tokens * shape.width * (shape.patches + 2 * hidden + 2 * shape.width)


def _block_macs(shape: ViTShape, *, rows: int, keys: int, projected: int | None = None) -> int:
    """Count one block: ``rows`` queries attend to ``keys`` keys, of which ``projected`` are computed."""
    projected = keys if projected is None else projected
    projections = (2 * rows + 2 * projected) * shape.width**2
    attention = 2 * rows * keys * shape.width
    return projections + attention + 2 * rows * shape.width * shape.hidden


def _ends(shape: ViTShape) -> int:
    """Count the patch embedding and the head."""
    return shape.patches * shape.patch_values * shape.width + shape.width * shape.classes
