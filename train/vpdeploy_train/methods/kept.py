"""What pruning left of a prompt set, and the masks that pruning reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vpdeploy_train.methods.method import PromptMethod
from vpdeploy_train.methods.options import Part

SEGMENTS = 16
"""Segments per token, R (E²VPT, arXiv 2307.13770, section 3.3)."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What pruning left of a prompt set, by original index.

    Attributes:
        tokens: For each block, the indices of the visual prompts it keeps, ascending.
        kv_tokens: For each block, the indices of the key/value prompts it keeps, ascending.
        segments: For each block, one row for each kept visual prompt, of R flags; False = that segment is zero.
        hidden: Indices of the kept hidden units of a feature projector, ascending; empty where there is none.
    """

    tokens: tuple[tuple[int, ...], ...]
    kv_tokens: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[tuple[bool, ...], ...], ...] = field(repr=False)
    hidden: tuple[int, ...] = ()

    @classmethod
    def everything(cls, depth: int, prompt_tokens: int, kv_tokens: int, hidden: int = 0) -> Kept:
        """Return the unpruned state: T visual and T_KV key/value prompts in each of L blocks, r hidden units."""
        tokens = tuple(range(prompt_tokens))
        return cls(
            tokens=(tokens,) * depth,
            kv_tokens=(tuple(range(kv_tokens)),) * depth,
            segments=(((True,) * SEGMENTS,) * prompt_tokens,) * depth,
            hidden=tuple(range(hidden)),
        )

    @property
    def live_tokens(self) -> list[int]:
        """For each block, how many of its visual prompts are not zero vectors."""
        return [sum(any(flags) for flags in block) for block in self.segments]

    @property
    def columns(self) -> list[int]:
        """For each block, the keys that deployment adds: zero vectors are equal, and merge into one."""
        return [
            live + (live < len(tokens)) + len(kv_tokens)
            for live, tokens, kv_tokens in zip(self.live_tokens, self.tokens, self.kv_tokens, strict=True)
        ]

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form; segments are strings of 1 and 0, one for each kept token."""
        fields: dict[str, Any] = {
            "tokens": [list(block) for block in self.tokens],
            "kv_tokens": [list(block) for block in self.kv_tokens],
            "segments": [["".join("01"[flag] for flag in row) for row in block] for block in self.segments],
        }
        if self.hidden:
            fields["hidden"] = list(self.hidden)
        return fields

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Kept:
        """Read the JSON form.

        Raises:
            ValueError: The parts contradict each other.
        """
        kept = cls(
            tokens=tuple(tuple(int(index) for index in block) for block in fields["tokens"]),
            kv_tokens=tuple(tuple(int(index) for index in block) for block in fields["kv_tokens"]),
            segments=tuple(tuple(tuple(flag == "1" for flag in row) for row in block) for block in fields["segments"]),
            hidden=tuple(int(index) for index in fields.get("hidden", ())),
        )
        rows = [len(block) for block in kept.segments]
        if rows != [len(block) for block in kept.tokens] or len(kept.kv_tokens) != len(kept.tokens):
            raise ValueError("kept tokens, key/value prompts and segments disagree")
        if any(len(row) != SEGMENTS or not {*row} <= {"0", "1"} for block in fields["segments"] for row in block):
            raise ValueError(f"every kept token should have {SEGMENTS} segments, each 0 or 1")
        indices = (*kept.tokens, *kept.kv_tokens, kept.hidden)
        if any(block != tuple(sorted({*block})) or min(block, default=0) < 0 for block in indices):
            raise ValueError("the indices of kept prompts should ascend from 0 or more")
        return kept

    def check_depth(self, depth: int) -> None:
        """Check the number of blocks.

        Raises:
            ValueError: It is another.
        """
        if len(self.tokens) != depth:
            raise ValueError(f"{len(self.tokens)} blocks, {depth} expected")


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Mask variables ρ, fixed at 1, whose gradient is the importance of what they multiply (E²VPT, eq. 7).

    Attributes:
        tokens: For each block, [T].
        kv_tokens: For each block, [T_KV].
        segments: For each block, [T, R].
        hidden: Of the hidden units, [r].
    """

    tokens: list[Tensor]
    kv_tokens: list[Tensor]
    segments: list[Tensor]
    hidden: Tensor

    @property
    def all(self) -> list[list[Tensor]]:
        """Every mask, by kind."""
        return [self.tokens, self.kv_tokens, self.segments, [self.hidden]]


class PrunableMethod(PromptMethod):
    """Prompts that can be scored, removed and rewound.

    Attributes:
        kept: Which prompts there are.
        masks: Multiply the prompts while they are being scored; None otherwise.
    """

    parts: ClassVar[frozenset[Part]] = frozenset({"tokens"})
    kept: Kept
    masks: Masks | None = None

    @property
    def segmented(self) -> bool:
        """Whether its visual prompts enter as they are stored, and so can lose segments or be zero."""
        return "segments" in self.parts

    @contextmanager
    def masked(self, masks: Masks) -> Iterator[None]:
        """Multiply the prompts by masks for the time of the context."""
        self.masks = masks
        try:
            yield
        finally:
            self.masks = None

    def pruned_to(self, kept: Kept, state: dict[str, Tensor]) -> PrunableMethod:
        """Return a smaller method whose tensors are gathered from another state of the same run.

        Args:
            kept: What to keep; a subset of what this method holds.
            state: A ``state_dict`` of this method, e.g. the initial one to rewind to.

        Returns:
            A new method that shares no memory with this one.
        """
        raise NotImplementedError
