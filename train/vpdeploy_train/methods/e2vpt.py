"""E²VPT (arXiv 2307.13770): visual prompts per block plus key/value prompts, with pruning by removal.

VPT-deep (arXiv 2203.12119) is the case without key/value prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vpdeploy_train.attention import Prefix, project_prompts
from vpdeploy_train.methods.method import PromptMethod

SegmentOrder = Literal["contiguous", "strided"]

SEGMENTS = 16
"""Segments per token, R in the paper (section 3.3)."""


@dataclass(frozen=True, kw_only=True)
class PromptDimensions:
    """Sizes that a prompt set takes from its backbone.

    Attributes:
        depth: Blocks, L.
        width: Token width, D.
        heads: Attention heads, H.
        head_width: Width of a head, d.
        patch_size: Side of a patch, in pixels; sets the initial scale.
    """

    depth: int
    width: int
    heads: int
    head_width: int
    patch_size: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What pruning left of a prompt set, by original index.

    Attributes:
        tokens: For each block, the indices of the visual prompts it keeps, ascending.
        kv_tokens: For each block, the indices of the key/value prompts it keeps, ascending.
        segments: For each block, one row for each kept visual prompt, of R flags; False = that segment is zero.
    """

    tokens: tuple[tuple[int, ...], ...]
    kv_tokens: tuple[tuple[int, ...], ...]
    segments: tuple[tuple[tuple[bool, ...], ...], ...] = field(repr=False)

    @classmethod
    def everything(cls, depth: int, prompt_tokens: int, kv_tokens: int) -> Kept:
        """Return the unpruned state: T visual and T_KV key/value prompts in each of L blocks."""
        tokens = tuple(range(prompt_tokens))
        return cls(
            tokens=(tokens,) * depth,
            kv_tokens=(tuple(range(kv_tokens)),) * depth,
            segments=(((True,) * SEGMENTS,) * prompt_tokens,) * depth,
        )

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form; segments are strings of 1 and 0, one for each kept token."""
        return {
            "tokens": [list(block) for block in self.tokens],
            "kv_tokens": [list(block) for block in self.kv_tokens],
            "segments": [["".join("01"[flag] for flag in row) for row in block] for block in self.segments],
        }

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
        )
        rows = [len(block) for block in kept.segments]
        if rows != [len(block) for block in kept.tokens] or len(kept.kv_tokens) != len(kept.tokens):
            raise ValueError("kept tokens, key/value prompts and segments disagree")
        if any(len(row) != SEGMENTS or not {*row} <= {"0", "1"} for block in fields["segments"] for row in block):
            raise ValueError(f"every kept token should have {SEGMENTS} segments, each 0 or 1")
        if any(block != tuple(sorted({*block})) or min(block, default=0) < 0 for block in kept.tokens + kept.kv_tokens):
            raise ValueError("the indices of kept prompts should ascend from 0 or more")
        return kept


class E2VPT(PromptMethod):
    """Visual prompts P[l] (T, D) and key/value prompts A[l] (H, T_KV, d) for every block l.

    Pruned tokens are absent from the tensors, not zero: a zero token would still be attended to. Pruned segments are
    zeros inside a token that stays.

    Initial values: P ~ U(-v, v), v = √(6 / (3·patch² + D)) (VPT); A ~ U(-b, b), b = √(6 / (T_KV·d)), which is
    kaiming-uniform on (H, T_KV, d) (E²VPT's code).

    Args:
        dimensions: Sizes taken from the backbone.
        kept: Which prompts there are.
        kv_shared: Keys and values share one tensor A (paper), or each has its own.
        dropout: Element-wise dropout on the visual prompts while training.
        segment_order: ``contiguous`` segments (the paper's drawing) or ``strided`` channels {r, r+R, ...} (its code).
        generator: Source of the initial values.
    """

    def __init__(
        self,
        dimensions: PromptDimensions,
        kept: Kept,
        *,
        kv_shared: bool = True,
        dropout: float = 0.1,
        segment_order: SegmentOrder = "contiguous",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.kept = kept
        self.kv_shared = kv_shared
        self.dropout = dropout
        self.segment_order = segment_order
        visual_bound = math.sqrt(6 / (3 * dimensions.patch_size**2 + dimensions.width))

        def uniform(shape: Sequence[int], bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))

        def kv_prompts() -> nn.ParameterList:
            sizes = [(dimensions.heads, len(block), dimensions.head_width) for block in kept.kv_tokens]
            return nn.ParameterList([uniform(size, math.sqrt(6 / max(size[1] * size[2], 1))) for size in sizes])

        self.visual = nn.ParameterList([uniform((len(block), dimensions.width), visual_bound) for block in kept.tokens])
        self.kv = kv_prompts()
        self.kv_value = None if kv_shared else kv_prompts()
        for index, block in enumerate(kept.segments):
            self.register_buffer(f"segment_mask_{index}", self._channel_mask(block), persistent=False)

    def prompts(self, index: int) -> Tensor:
        """Return block ``index``'s visual prompts with pruned segments zeroed, [T, D]."""
        mask: Tensor = self.get_buffer(f"segment_mask_{index}")
        prompts: Tensor = self.visual[index] * mask
        return prompts

    def prefix(self, index: int, block: Block, tokens: Tensor) -> Prefix | None:
        """Return block ``index``'s prefix: key/value prompts first, then the projected visual prompts."""
        keys, values = [], []
        if self.kept.kv_tokens[index]:
            keys.append(self.kv[index])
            values.append(self.kv[index] if self.kv_value is None else self.kv_value[index])
        if self.kept.tokens[index]:
            prompts = F.dropout(self.prompts(index), self.dropout, training=self.training)
            key, value = project_prompts(block, prompts)
            keys.append(key)
            values.append(value)
        if not keys:
            return None
        # Under autocast the projections are in half precision and the key/value prompts are not.
        dtype = keys[-1].dtype
        return Prefix(
            key=torch.cat([part.to(dtype) for part in keys], dim=-2),
            value=torch.cat([part.to(dtype) for part in values], dim=-2),
        )

    def pruned_to(self, kept: Kept, state: dict[str, Tensor]) -> E2VPT:
        """Return a smaller method whose tensors are gathered from another state of the same run.

        Args:
            kept: What to keep; a subset of what this method holds.
            state: A ``state_dict`` of this method, e.g. the initial one to rewind to.

        Returns:
            A new method that shares no memory with this one.
        """
        smaller = E2VPT(
            self.dimensions,
            kept,
            kv_shared=self.kv_shared,
            dropout=self.dropout,
            segment_order=self.segment_order,
        )
        gathered: dict[str, Tensor] = {}
        for index in range(self.dimensions.depth):
            rows = [self.kept.tokens[index].index(token) for token in kept.tokens[index]]
            kv_rows = [self.kept.kv_tokens[index].index(token) for token in kept.kv_tokens[index]]
            gathered[f"visual.{index}"] = state[f"visual.{index}"][rows]
            for name in ("kv",) if self.kv_shared else ("kv", "kv_value"):
                gathered[f"{name}.{index}"] = state[f"{name}.{index}"][:, kv_rows]
        smaller.load_state_dict(gathered, strict=True)
        return smaller

    def structure(self) -> dict[str, Any]:
        """Return kept indices and options, JSON-ready."""
        return {
            "kept": self.kept.to_fields(),
            "kv_shared": self.kv_shared,
            "segment_order": self.segment_order,
        }

    def summary(self) -> dict[str, Any]:
        """Return counts of what was kept, JSON-ready.

        ``parameters`` is the paper's count: trained numbers minus pruned segments' channels.
        """
        segment_width = self.dimensions.width // SEGMENTS
        zeroed = sum(not flag for block in self.kept.segments for row in block for flag in row) * segment_width
        return {
            "tokens_per_block": [len(block) for block in self.kept.tokens],
            "kv_tokens_per_block": [len(block) for block in self.kept.kv_tokens],
            "segments_kept": sum(flag for block in self.kept.segments for row in block for flag in row),
            "segments": sum(len(row) for block in self.kept.segments for row in block),
            "parameters": sum(parameter.numel() for parameter in self.parameters()) - zeroed,
        }

    def _channel_mask(self, block: tuple[tuple[bool, ...], ...]) -> Tensor:
        """Return a block's segment flags as factors of its prompts' channels, [T, D]."""
        flags = torch.tensor(block, dtype=torch.float32).reshape(len(block), SEGMENTS)
        return spread_segments(flags, self.dimensions.width, self.segment_order)


def spread_segments(values: Tensor, width: int, order: SegmentOrder) -> Tensor:
    """Repeat per-segment values over the channels of each segment: [T, R] to [T, D]."""
    repeats = width // SEGMENTS
    return values.repeat_interleave(repeats, dim=-1) if order == "contiguous" else values.repeat(1, repeats)


def gather_segments(values: Tensor, order: SegmentOrder) -> Tensor:
    """Sum per-channel values over the channels of each segment: [T, D] to [T, R]."""
    repeats = values.shape[-1] // SEGMENTS
    shape, axis = ((SEGMENTS, repeats), -1) if order == "contiguous" else ((repeats, SEGMENTS), -2)
    return torch.unflatten(values, -1, shape).sum(axis)
