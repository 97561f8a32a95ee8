"""E²VPT (arXiv 2307.13770): visual prompts per block plus key/value prompts, with pruning by removal.

VPT-deep (arXiv 2203.12119) is the case without key/value prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.kept import SEGMENTS, Kept, PrunableMethod
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.methods.options import SegmentOptions, SegmentOrder
from vpdeploy_train.option import between, option

if TYPE_CHECKING:
    from typing_extensions import Self

    from vpdeploy_train.trunks import Trunk


class E2VPT(PrunableMethod):
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

    Raises:
        SpecError: A block's width cannot be divided into segments.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SegmentOptions):
        """What a user can choose."""

        kv_tokens: int = option(5, "key/value prompts per block", limits=between(0, 1000), sweep=(1, 5, 10))
        kv_shared: bool = option(True, "keys and values share one tensor of key/value prompts")

    parts = frozenset({"tokens", "key_values", "segments"})
    pruned_by_default = True

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
        for width in {stage.width for stage in dimensions.blocks}:
            if width % SEGMENTS:
                raise SpecError(f"token width {width} is not divisible into {SEGMENTS} segments")
        self.dimensions = dimensions
        self.kept = kept
        self.kv_shared = kv_shared
        self.dropout = dropout
        self.segment_order = segment_order
        patch = dimensions.patch_size

        def uniform(shape: Sequence[int], bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))

        def kv_prompts() -> nn.ParameterList:
            sizes = [
                (stage.heads, len(block), stage.head_width)
                for stage, block in zip(dimensions.blocks, kept.kv_tokens, strict=True)
            ]
            return nn.ParameterList([uniform(size, math.sqrt(6 / max(size[1] * size[2], 1))) for size in sizes])

        self.visual = nn.ParameterList(
            [
                uniform((len(block), stage.width), math.sqrt(6 / (3 * patch**2 + stage.width)))
                for stage, block in zip(dimensions.blocks, kept.tokens, strict=True)
            ]
        )
        self.kv = kv_prompts()
        self.kv_value = None if kv_shared else kv_prompts()
        for index, block in enumerate(kept.segments):
            self.register_buffer(f"segment_mask_{index}", self._channel_mask(index, block), persistent=False)

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Options, generator: torch.Generator) -> Self:
        """Return fresh prompts of the lengths chosen."""
        return cls(
            dimensions,
            Kept.everything(dimensions.depth, options.prompt_tokens, options.kv_tokens),
            kv_shared=options.kv_shared,
            dropout=options.prompt_dropout,
            segment_order=options.segment_order,
            generator=generator,
        )

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Self:
        """Return prompts of a stored ``structure``; its complaints are ``PromptMethod.restore``'s."""
        kept = Kept.from_fields(structure["kept"])
        kept.check_depth(dimensions.depth)
        order = structure["segment_order"]
        if order not in ("contiguous", "strided"):
            raise ValueError(f"segment order '{order}', contiguous or strided expected")
        return cls(dimensions, kept, kv_shared=bool(structure["kv_shared"]), segment_order=order)

    def rows(self, index: int) -> Tensor:
        """Return block ``index``'s visual prompts with pruned segments zeroed, [T, D]."""
        rows: Tensor = self.visual[index] * self.get_buffer(f"segment_mask_{index}")
        if self.masks is not None:
            width = self.dimensions.blocks[index].width
            rows = rows * spread_segments(self.masks.segments[index], width, self.segment_order)
            rows = rows * self.masks.tokens[index][:, None]
        return rows

    def prompts(self, index: int, trunk: Trunk, tokens: Tensor) -> Tensor | None:
        """Return block ``index``'s visual prompts, [T, D], with dropout while training."""
        if not self.kept.tokens[index]:
            return None
        return F.dropout(self.rows(index), self.dropout, training=self.training)

    def key_values(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return block ``index``'s key/value prompts, each [H, T_KV, d]."""
        if not self.kept.kv_tokens[index]:
            return None
        key: Tensor = self.kv[index]
        value: Tensor = key if self.kv_value is None else self.kv_value[index]
        if self.masks is not None:
            mask = self.masks.kv_tokens[index][:, None]
            key, value = key * mask, value * mask
        return key, value

    def pruned_to(self, kept: Kept, state: dict[str, Tensor]) -> Self:
        """Return a smaller method whose tensors are gathered from another state of the same run.

        Args:
            kept: What to keep; a subset of what this method holds.
            state: A ``state_dict`` of this method, e.g. the initial one to rewind to.

        Returns:
            A new method that shares no memory with this one.
        """
        smaller = self.resized(kept)
        gathered: dict[str, Tensor] = {}
        for index in range(self.dimensions.depth):
            rows = [self.kept.tokens[index].index(token) for token in kept.tokens[index]]
            kv_rows = [self.kept.kv_tokens[index].index(token) for token in kept.kv_tokens[index]]
            gathered[f"visual.{index}"] = state[f"visual.{index}"][rows]
            for name in ("kv",) if self.kv_shared else ("kv", "kv_value"):
                gathered[f"{name}.{index}"] = state[f"{name}.{index}"][:, kv_rows]
        smaller.load_state_dict(gathered, strict=True)
        return smaller

    def resized(self, kept: Kept) -> Self:
        """Return a method of the same options that holds other prompts, their values still to be set."""
        return type(self)(
            self.dimensions,
            kept,
            kv_shared=self.kv_shared,
            dropout=self.dropout,
            segment_order=self.segment_order,
        )

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
        zeroed = sum(
            stage.width // SEGMENTS * sum(not flag for row in block for flag in row)
            for stage, block in zip(self.dimensions.blocks, self.kept.segments, strict=True)
        )
        return {
            "tokens_per_block": [len(block) for block in self.kept.tokens],
            "live_tokens_per_block": self.kept.live_tokens,
            "kv_tokens_per_block": [len(block) for block in self.kept.kv_tokens],
            "segments_kept": sum(flag for block in self.kept.segments for row in block for flag in row),
            "segments": sum(len(row) for block in self.kept.segments for row in block),
            "parameters": sum(parameter.numel() for parameter in self.parameters()) - zeroed,
        }

    def _channel_mask(self, index: int, block: tuple[tuple[bool, ...], ...]) -> Tensor:
        """Return a block's segment flags as factors of its prompts' channels, [T, D]."""
        flags = torch.tensor(block, dtype=torch.float32).reshape(len(block), SEGMENTS)
        return spread_segments(flags, self.dimensions.blocks[index].width, self.segment_order)


class VPTDeep(E2VPT):
    """VPT-deep (arXiv 2203.12119, eq. 4-5): visual prompts alone."""

    @dataclass(frozen=True, kw_only=True)
    class Options(SegmentOptions):
        """What a user can choose."""

    parts = frozenset({"tokens", "segments"})
    pruned_by_default = False

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: SegmentOptions, generator: torch.Generator) -> Self:
        """Return fresh prompts without key/value prompts."""
        return cls(
            dimensions,
            Kept.everything(dimensions.depth, options.prompt_tokens, 0),
            dropout=options.prompt_dropout,
            segment_order=options.segment_order,
            generator=generator,
        )


def spread_segments(values: Tensor, width: int, order: SegmentOrder) -> Tensor:
    """Repeat per-segment values over the channels of each segment: [T, R] to [T, D]."""
    repeats = width // SEGMENTS
    return values.repeat_interleave(repeats, dim=-1) if order == "contiguous" else values.repeat(1, repeats)
