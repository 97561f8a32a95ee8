"""What a prompt method is: a module that gives every block of a frozen backbone its prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vpdeploy.format.task import Stage
from vpdeploy_train.methods.options import PROMPT_RATES, MethodOptions, Part, Rates

if TYPE_CHECKING:
    from typing_extensions import Self

    from vpdeploy_train.trunks import Trunk  # which loads timm: the command line reads methods' options without it

Form = Literal["prefix", "adaptive", "tokens", "weights"]
"""What is left of a method when it is deployed: keys and values that do not depend on the image; a generator of them;
tokens that live on through the blocks; or other weights of the backbone. Only the first two can share a graph."""


@dataclass(frozen=True, kw_only=True)
class PromptDimensions:
    """Sizes that a prompt set takes from its backbone.

    Attributes:
        blocks: Width, heads and head width of each of the L blocks.
        patch_size: Side of a patch, in pixels; sets the initial scale.
        grid: Patches along a side where all blocks share one patch grid, else None.
        norm_eps: Of the blocks' pre-attention LayerNorm; None where there is another norm or no shared grid.
    """

    blocks: tuple[Stage, ...]
    patch_size: int
    grid: int | None = None
    norm_eps: float | None = None

    @classmethod
    def of(cls, trunk: Trunk) -> PromptDimensions:
        """Return the sizes of a backbone."""
        norm = None if trunk.grid is None else trunk.norm(0)
        return cls(
            blocks=trunk.block_stages,
            patch_size=trunk.patch_size,
            grid=trunk.grid,
            norm_eps=norm.eps if isinstance(norm, nn.LayerNorm) else None,
        )

    @property
    def depth(self) -> int:
        """Blocks, L."""
        return len(self.blocks)


@dataclass(frozen=True, kw_only=True)
class Generator:
    """One block's adaptive prompts, compiled: how they are made from the block's normalised patches x̂ (n, D).

    ``G = scale ⊙ (mix x̂) + shift``; ``prompts = G + up relu(down G)`` (VAPT, arXiv 2501.18936, eq. 8-11, with
    convolution, token projector and LayerNorm affine multiplied out).

    Attributes:
        mix: [T, n].
        scale: [D].
        shift: [T, D].
        down: [r, D].
        up: [D, r].
        eps: Of the LayerNorm that gives x̂.
    """

    mix: Tensor
    scale: Tensor
    shift: Tensor
    down: Tensor
    up: Tensor
    eps: float


def stored_count(structure: dict[str, Any], name: str, *, least: int, most: int) -> int:
    """Return a number of a stored structure, before anything of that size is made.

    Args:
        structure: As ``PromptMethod.structure`` returned it.
        name: The number's name.
        least: Its smallest value.
        most: Its largest one.

    Raises:
        KeyError: It is missing.
        ValueError: It is no whole number, or out of range.
    """
    value = structure[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"'{name}' is {value!r}, {least} to {most} expected")
    return value


class PromptMethod(nn.Module):
    """The prompts of one task. All its parameters are trained; the backbone's are not, unless ``adapt`` says so.

    A method overrides what it needs; without overrides there are no prompts, and the head alone is trained.

    Attributes:
        Options: What a user can choose about it: a dataclass, from which flags, TOML keys, checks and sweeps derive.
        form: What is left of the method when it is deployed.
        parts: What pruning can take from it; empty where pruning and rewinding do not apply.
        pruned_by_default: Whether pruning follows the training where nobody chooses.
        rates: Its learning rates where nobody chooses one.
        settles_head: Whether a classifier that starts at a linear probe moves slowly beside it, by default.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    form: ClassVar[Form] = "prefix"
    parts: ClassVar[frozenset[Part]] = frozenset()
    pruned_by_default: ClassVar[bool] = False
    rates: ClassVar[Rates] = PROMPT_RATES
    settles_head: ClassVar[bool] = True

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Any, generator: torch.Generator) -> Self:
        """Return fresh prompts.

        Args:
            dimensions: Sizes taken from the backbone.
            options: What the user chose: an object of ``Options``.
            generator: Source of the initial values.

        Raises:
            SpecError: The method does not fit the backbone.
        """
        return cls()

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Self:
        """Return prompts of a stored ``structure``, their values still to be loaded.

        Raises:
            KeyError: A part of the structure is missing.
            TypeError: A part is of another kind.
            ValueError: A part makes no sense, or not on this backbone.
        """
        return cls()

    def adapt(self, model: nn.Module) -> nn.Module:
        """Return the backbone that the model runs: ``model`` itself, or a copy whose weights the method owns."""
        return model

    def inserted(self) -> Tensor | None:
        """Return rows, [T, D], that enter before the first block and live on through all of them, or None."""
        return None

    def prompts(self, index: int, trunk: Trunk, tokens: Tensor) -> Tensor | None:
        """Return block ``index``'s visual prompts, [T, D] or [B, T, D], or None.

        Args:
            index: Block, 0 to L - 1.
            trunk: The backbone.
            tokens: The block's input.
        """
        return None

    def key_values(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return prompts that are keys and values already, each [H, T_KV, d], or None."""
        return None

    def generator(self, index: int, trunk: Trunk) -> Generator | None:
        """Return the compiled form of block ``index``'s prompts where they depend on the image, else None."""
        return None

    def training_loss(self, labels: Tensor) -> Tensor | None:
        """Return what the method adds to the loss of the training step whose forward pass has just ended, or None.

        Args:
            labels: Of that pass's images, [B].

        Returns:
            A scalar that is added to the cross-entropy, or None. Evaluation and deployment never ask for it.
        """
        return None

    def structure(self) -> dict[str, Any]:
        """Return what, besides tensors, is needed to rebuild the method: JSON-ready."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return what was kept, for reports: JSON-ready; ``parameters`` is the paper's count."""
        return {"parameters": sum(parameter.numel() for parameter in self.parameters())}


class NoPrompts(PromptMethod):
    """A linear probe: the head is trained, the backbone sees no prompts."""

    settles_head = False
