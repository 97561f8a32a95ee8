"""Factored prompts: every block's prompts are combinations of a few rows that all blocks share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.methods.kept import Kept, PrunableMethod
from vpdeploy_train.methods.method import PromptDimensions, stored_count
from vpdeploy_train.methods.options import DeepOptions, Rates
from vpdeploy_train.option import between, option


class Factored(PrunableMethod):
    """Prompts ``P[l] = A[l] B`` of every block l, with A[l] (T, r) its own and B (r, D) shared by all.

    They do not depend on the image, so ``form`` stays "prefix": they are deployed as keys and values, in a file of
    their own or in a bundle beside tasks of other methods, and nothing is left of A and B.

    Initial values: A ~ N(0, 1/r); B ~ U(-v, v), v = √(6 / (3·patch² + D)), so that P begins at VPT's scale.

    Args:
        dimensions: Sizes taken from the backbone; all blocks must be equally wide.
        kept: Which prompts there are.
        rank: r.
        dropout: Element-wise, on the prompts, while training.
        generator: Source of the initial values.

    Raises:
        SpecError: The backbone's blocks differ in width.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DeepOptions):
        """What a user can choose; ``--prompt-tokens`` and ``--prompt-dropout`` are inherited."""

        factored_rank: int = option(4, "rows that all blocks share", limits=between(1, 1024), sweep=(2, 4, 8))

    rates = Rates(sgd=0.25, adamw=0.03)
    parts = frozenset({"tokens"})

    def __init__(
        self,
        dimensions: PromptDimensions,
        kept: Kept,
        *,
        rank: int,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len({stage.width for stage in dimensions.blocks}) > 1:
            raise SpecError("method 'factored' needs blocks of one width; use e2vpt or vpt-deep")
        width = dimensions.blocks[0].width
        bound = math.sqrt(6 / (3 * dimensions.patch_size**2 + width))
        self.dimensions = dimensions
        self.kept = kept
        self.dropout = dropout
        self.shared = nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound, generator=generator))
        self.own = nn.ParameterList(
            [torch.empty(len(block), rank).normal_(generator=generator) / math.sqrt(rank) for block in kept.tokens]
        )

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Options, generator: torch.Generator) -> Factored:
        """Return fresh prompts of the length chosen."""
        return cls(
            dimensions,
            Kept.everything(dimensions.depth, options.prompt_tokens, 0),
            rank=options.factored_rank,
            dropout=options.prompt_dropout,
            generator=generator,
        )

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Factored:
        """Return prompts of a stored ``structure``, which comes from a file: check it before making anything."""
        kept = Kept.from_fields(structure["kept"])
        kept.check_depth(dimensions.depth)
        return cls(dimensions, kept, rank=stored_count(structure, "rank", least=1, most=1024))

    def structure(self) -> dict[str, Any]:
        """Return what ``restore`` needs besides the tensors, JSON-ready."""
        return {"kept": self.kept.to_fields(), "rank": len(self.shared)}

    def prompts(self, index: int, trunk: Any, tokens: Tensor) -> Tensor | None:
        """Return block ``index``'s prompts, [T, D]; a mask, while they are scored, multiplies whole prompts."""
        if not self.kept.tokens[index]:
            return None
        rows = F.dropout(self.own[index] @ self.shared, self.dropout, training=self.training)
        return rows if self.masks is None else rows * self.masks.tokens[index][:, None]

    def pruned_to(self, kept: Kept, state: dict[str, Tensor]) -> Factored:
        """Return a smaller method whose A[l] are gathered from another state of the same run."""
        smaller = type(self)(self.dimensions, kept, rank=len(self.shared), dropout=self.dropout)
        gathered = {"shared": state["shared"]}
        for index, block in enumerate(kept.tokens):
            gathered[f"own.{index}"] = state[f"own.{index}"][[self.kept.tokens[index].index(token) for token in block]]
        smaller.load_state_dict({name: value.clone() for name, value in gathered.items()}, strict=True)
        return smaller

    def summary(self) -> dict[str, Any]:
        """Return counts of what was kept, JSON-ready."""
        return {**super().summary(), "tokens_per_block": [len(block) for block in self.kept.tokens]}
