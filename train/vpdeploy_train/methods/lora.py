"""LoRA (arXiv 2106.09685): low-rank updates of the query and value projections, merged at export."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.method import PromptDimensions, PromptMethod, stored_count
from vpdeploy_train.methods.options import MethodOptions, Rates
from vpdeploy_train.option import between, option

if TYPE_CHECKING:
    from typing_extensions import Self


_MOST_RANK = 1 << 16
"""In a stored run; no projection is that wide."""


class _Update(nn.Module):
    """A parametrization W + [B_q A_q ; 0 ; B_v A_v] of a fused query, key and value projection (eq. 3)."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = down, up, scale

    def forward(self, weight: Tensor) -> Tensor:
        query, value = self.scale * (self.up @ self.down)
        return weight + torch.cat([query, torch.zeros_like(query), value])


class LoRA(PromptMethod):
    """Matrices A (2, r, D) and B (2, D, r) for each block's query and value projections; B starts at zero.

    Nothing is left of it at run time: the exported weights hold the update. For the same reason its tasks cannot share
    a graph.

    Args:
        dimensions: Sizes taken from the backbone.
        rank: r.
        alpha: The update is scaled by alpha / r.
        generator: Source of A's initial values, kaiming-uniform as in the paper's code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(MethodOptions):
        """What a user can choose."""

        lora_rank: int = option(8, "rank of the updates", limits=between(1, 1024))

    form = "weights"
    rates = Rates(sgd=0.1, adamw=4e-3)
    settles_head = False

    def __init__(
        self,
        dimensions: PromptDimensions,
        rank: int,
        *,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dimensions.grid is None:
            raise SpecError("method 'lora' is written for plain ViTs; use e2vpt or vpt-deep")
        self.rank = rank
        self.alpha = float(2 * rank) if alpha is None else alpha
        widths = [stage.width for stage in dimensions.blocks]
        self.down = nn.ParameterList(
            [torch.empty(2, rank, width).uniform_(-1, 1, generator=generator) / math.sqrt(width) for width in widths]
        )
        self.up = nn.ParameterList([torch.zeros(2, width, rank) for width in widths])

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Options, generator: torch.Generator) -> Self:
        """Return fresh updates of the rank chosen."""
        return cls(dimensions, options.lora_rank, generator=generator)

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Self:
        """Return updates of a stored ``structure``; its complaints are ``PromptMethod.restore``'s."""
        rank, alpha = stored_count(structure, "rank", least=1, most=_MOST_RANK), float(structure["alpha"])
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}, a finite number expected")
        return cls(dimensions, rank, alpha=alpha)

    def adapt(self, model: nn.Module) -> nn.Module:
        """Return a copy of the backbone whose projections hold the update.

        Raises:
            SpecError: Its queries, keys and values come from three projections.
        """
        from vpdeploy_train.trunks import trunk_of  # loads timm

        adapted = copy.deepcopy(model)
        blocks: Any = trunk_of(adapted).blocks
        if any(block.attn.qkv is None for block in blocks):
            raise SpecError("method 'lora' needs query, key and value in one projection; use e2vpt or vpt-deep")
        for block, down, up in zip(blocks, self.down, self.up, strict=True):
            update = _Update(down, up, self.alpha / self.rank)
            parametrize.register_parametrization(block.attn.qkv, "weight", update)
        return adapted

    def structure(self) -> dict[str, Any]:
        """Return rank and scale."""
        return {"rank": self.rank, "alpha": self.alpha}
