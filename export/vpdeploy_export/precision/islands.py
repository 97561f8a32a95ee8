"""The parts of a narrow graph that are float32, and the changes of type at their shores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

IslandPart = Literal["attention", "mlp", "residual"]
"""A part of a block. ``attention`` is projections, prompts, logits and output projection; ``mlp`` is its products and
activation; ``residual`` is the tokens between them."""

PARTS: tuple[IslandPart, ...] = get_args(IslandPart)


@dataclass(frozen=True, kw_only=True)
class Islands:
    """Which parts of a float16 or bfloat16 graph are float32.

    Attributes:
        blocks: The float32 parts by block, 0 to L - 1; blocks without any are absent.
        embedding: Whether the patch embedding is float32.
        final: Whether the final norm and pooling are float32.
    """

    blocks: Mapping[int, frozenset[IslandPart]] = field(default_factory=dict)
    embedding: bool = False
    final: bool = False

    def __bool__(self) -> bool:
        return self.embedding or self.final or any(self.blocks.values())

    @property
    def widen_prompts(self) -> bool:
        """Whether some block attends in float32: a table of narrow prompts would not reach it."""
        return any("attention" in parts for parts in self.blocks.values())

    def of(self, block: int) -> frozenset[IslandPart]:
        """Return the float32 parts of one block."""
        return self.blocks.get(block, frozenset())

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form: parts by place, ``embedding``, ``blocks.0``, ..., ``final``."""
        fields: dict[str, Any] = {"embedding": ["weights"]} if self.embedding else {}
        for index in sorted(self.blocks):
            if parts := [part for part in PARTS if part in self.blocks[index]]:
                fields[f"blocks.{index}"] = parts
        return {**fields, "final": ["norm"]} if self.final else fields

    def describe(self) -> str:
        """Return them in words, e.g. ``block 3 mlp, blocks 3-11 residual``."""
        words = ["patch embedding"] if self.embedding else []
        for part in PARTS:
            for first, last in _ranges([index for index in sorted(self.blocks) if part in self.blocks[index]]):
                words.append(f"block {first} {part}" if first == last else f"blocks {first}-{last} {part}")
        return ", ".join([*words, "final norm"] if self.final else words)


NO_ISLANDS = Islands()


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a value in a type; a value that has it goes through without an operation."""
    return value if value.dtype == dtype else value.to(dtype)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Return runs of consecutive numbers, first and last of each."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
