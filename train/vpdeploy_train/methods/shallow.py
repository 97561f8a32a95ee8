"""VPT-shallow (arXiv 2203.12119): prompt tokens that enter before the first block and live on through all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.method import PromptDimensions, PromptMethod, stored_count
from vpdeploy_train.methods.options import TokenOptions

if TYPE_CHECKING:
    from typing_extensions import Self


_MOST_TOKENS = 100_000
"""In a stored run; far beyond what attention could read."""


class VPTShallow(PromptMethod):
    """One tensor P0 (T, D), eq. 2-3 of the paper: unlike deep prompts, its rows are real tokens in every block.

    Args:
        dimensions: Sizes taken from the backbone.
        tokens: Prompts, T.
        dropout: Element-wise, while training.
        generator: Source of the initial values, U(-v, v) with v = √(6 / (3·patch² + D)).

    Raises:
        SpecError: The backbone's tokens are no plain sequence.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(TokenOptions):
        """What a user can choose; the paper trains shallow prompts without dropout."""

    form = "tokens"

    def __init__(
        self,
        dimensions: PromptDimensions,
        tokens: int,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dimensions.grid is None:
            raise SpecError("method 'vpt-shallow' needs a plain ViT: its prompts stay tokens; use e2vpt or vpt-deep")
        width = dimensions.blocks[0].width
        bound = math.sqrt(6 / (3 * dimensions.patch_size**2 + width))
        self.dropout = dropout
        self.visual = nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound, generator=generator))

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Options, generator: torch.Generator) -> Self:
        """Return fresh prompts; the paper trains them without dropout."""
        return cls(dimensions, options.prompt_tokens, generator=generator)

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Self:
        """Return prompts of a stored ``structure``; its complaints are ``PromptMethod.restore``'s."""
        return cls(dimensions, stored_count(structure, "tokens", least=0, most=_MOST_TOKENS))

    def inserted(self) -> Tensor:
        """Return the prompts, [T, D], with dropout while training."""
        return F.dropout(self.visual, self.dropout, training=self.training)

    def structure(self) -> dict[str, Any]:
        """Return the number of prompts."""
        return {"tokens": len(self.visual)}
