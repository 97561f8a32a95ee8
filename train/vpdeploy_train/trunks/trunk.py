"""What prompts need of a frozen backbone: its blocks, one at a time, with a prefix on their attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vpdeploy.format.task import Stage


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values that precede those of a block's tokens.

    Attributes:
        key: The keys, [H, P, d], or [B, H, P, d] where they depend on the image.
        value: The values, shaped like the keys.
        bias: What is added to the prefix's attention logits, [P] or [B, P]; None means zero.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


class Trunk(ABC):
    """One family of timm models, seen as an embedding, L blocks and a pooled feature.

    A trunk holds no tensors of its own: the model's parts are used as they are.

    Args:
        model: The timm model; it was created with ``num_classes=0``.
    """

    model_type: ClassVar[type[nn.Module]]
    """The timm class of the family's models."""

    model: Any  # whose parts timm types as "Tensor | Module"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def refusal(cls, model: Any) -> str | None:
        """Say what of a model of ``model_type`` prompts cannot enter, as a clause about "it"; None if nothing is."""

    @abstractmethod
    def timm_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return published tensors under timm's names, brought to the model's image size."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The L blocks in order, of all stages."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages: each is a run of consecutive blocks of the same width and number of heads."""

    @property
    def block_stages(self) -> tuple[Stage, ...]:
        """The stage of each of the L blocks."""
        return tuple(stage for stage in self.stages for _ in range(stage.depth))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; where there are several stages, of a patch of the first one."""
        return int(self.model.patch_embed.patch_size[0])

    @property
    def image_size(self) -> int:
        """Side of the input, in pixels."""
        return int(self.model.patch_embed.img_size[0])

    @property
    def feature_width(self) -> int:
        """Width of the pooled feature."""
        return int(self.model.num_features)

    @property
    def reads_class_token_only(self) -> bool:
        """Whether the feature is the first row alone, so that the last block may compute only that."""
        return False

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised images [B, 3, H, W] into the first block's tokens."""

    def enter(self, index: int, tokens: Tensor) -> Tensor:
        """Return the tokens that block ``index`` reads, in its own width, of those that the block before it returned.

        Args:
            index: The block, 0 to L - 1.
            tokens: What ``embed`` or the block before it returned.
        """
        return tokens

    @abstractmethod
    def run(self, index: int, tokens: Tensor, prefix: Prefix | None, *, first_row_only: bool = False) -> Tensor:
        """Run block ``index`` on tokens that also attend to a prefix.

        Args:
            index: The block, 0 to L - 1.
            tokens: The block's input as ``enter`` returns it, [B, N, D], or in the form that ``embed`` gives.
            prefix: Keys and values to attend to besides the tokens' own, or None.
            first_row_only: Whether queries, output projection and MLP are computed for row 0 alone; keys and values
                still come from all rows. That is exact for the last block of a model that reads its class token only.

        Returns:
            What ``enter`` takes for the next block; [B, 1, D] if ``first_row_only``.
        """

    @abstractmethod
    def project(self, index: int, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that block ``index`` would give to prompt tokens.

        ``K = heads(W_k LN(P) + b_k)``, ``V = heads(W_v LN(P) + b_v)`` with the block's own frozen norm and
        projections (VPT, arXiv 2203.12119, eq. 4-5, restricted to what reaches other tokens).

        Args:
            index: The block, 0 to L - 1.
            prompts: The prompt tokens, [..., T, D].

        Returns:
            Key and value, each [..., H, T, d].
        """

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled feature, [B, D], of the last block's tokens."""

    @property
    def averages_rows(self) -> bool:
        """Whether the feature is a mean over rows [B, N, D], which appended prompt rows can enter."""
        return False

    @property
    def grid(self) -> int | None:
        """The number of patches along a side where all blocks share one patch grid, else None."""
        return None

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the rows of the patches, [B, n, D], without class token and registers.

        Raises:
            NotImplementedError: ``grid`` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no patch grid shared by all blocks")

    def norm(self, index: int) -> nn.Module:
        """Return block ``index``'s pre-attention norm.

        Raises:
            NotImplementedError: ``grid`` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} has no patch grid shared by all blocks")
