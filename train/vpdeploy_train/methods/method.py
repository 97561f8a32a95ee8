"""What a prompt method is: a module that gives every block its prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vpdeploy_train.attention import Prefix


class PromptMethod(nn.Module, ABC):
    """The prompts of one task. All its parameters are trained; the backbone's never are."""

    @abstractmethod
    def prefix(self, index: int, block: Block, tokens: Tensor) -> Prefix | None:
        """Return what block ``index`` attends to besides its own tokens.

        Args:
            index: Block, 0 to L - 1.
            block: The timm block; its norm and projections may be used.
            tokens: The block's input, [B, N, D].
        """

    def structure(self) -> dict[str, Any]:
        """Return what, besides tensors, is needed to rebuild the method: JSON-ready."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return what was kept, for reports: JSON-ready."""
        return {"parameters": sum(parameter.numel() for parameter in self.parameters())}


class NoPrompts(PromptMethod):
    """A linear probe: the head is trained, the backbone sees no prompts."""

    def prefix(self, index: int, block: Block, tokens: Tensor) -> None:
        """Return None: there are no prompts."""
        return
