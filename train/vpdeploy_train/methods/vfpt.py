"""VFPT (visual Fourier prompt tuning, arXiv 2411.01327): some prompts of a block pass a Fourier transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpdeploy_train.methods.e2vpt import VPTDeep
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions, stored_count
from vpdeploy_train.methods.options import DeepOptions
from vpdeploy_train.option import between, option

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_TOKENS = 100_000
"""In a stored run; far beyond what attention could read."""


class VFPT(VPTDeep):
    """Visual prompts P[l] (T, D) of every block l, of which the first m enter as their Fourier transform.

    ::

        prompts[l] = [Re FFT2(P[l][:m]) ; P[l][m:]]

    FFT2 is the discrete Fourier transform over the token and the channel axis, without a scale; Re is its real part
    (the paper's section 3.2). Nothing of it depends on the image, so it is computed once when a run is compiled, and
    what is deployed are plain prompts.

    Pruning removes whole tokens of P. Where it takes some of the first m, the transform is over those that are left:
    another function than zeroing them, to which the retraining after pruning adapts. Pruning them is ours.

    Args:
        dimensions: Sizes taken from the backbone.
        kept: Which prompts there are.
        fourier: m, counted before pruning.
        options: As ``E2VPT`` takes them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DeepOptions):
        """What a user can choose."""

        vfpt_share: float = option(0.5, "share of the prompts that are Fourier transformed", limits=between(0, 1))

    parts = frozenset({"tokens"})

    def __init__(self, dimensions: PromptDimensions, kept: Kept, *, fourier: int, **options: Any) -> None:
        super().__init__(dimensions, kept, **options)
        self.fourier = fourier

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Any, generator: torch.Generator) -> Self:
        """Return fresh prompts of the length chosen."""
        chosen: VFPT.Options = options
        return cls(
            dimensions,
            Kept.everything(dimensions.depth, chosen.prompt_tokens, 0),
            fourier=round(chosen.vfpt_share * chosen.prompt_tokens),
            dropout=chosen.prompt_dropout,
            generator=generator,
        )

    @classmethod
    def restore(cls, dimensions: PromptDimensions, structure: dict[str, Any]) -> Self:
        """Return prompts of a stored ``structure``; its complaints are ``PromptMethod.restore``'s."""
        kept = Kept.from_fields(structure["kept"])
        kept.check_depth(dimensions.depth)
        return cls(dimensions, kept, fourier=stored_count(structure, "fourier", least=0, most=_MOST_TOKENS))

    def rows(self, index: int) -> Tensor:
        """Return block ``index``'s prompts as they enter, [T, D]."""
        prompts = super().rows(index)
        transformed = sum(token < self.fourier for token in self.kept.tokens[index])
        if not transformed:
            return prompts
        return torch.cat([torch.fft.fft2(prompts[:transformed]).real, prompts[transformed:]])

    def structure(self) -> dict[str, Any]:
        """Return kept indices and m, JSON-ready."""
        return {"kept": self.kept.to_fields(), "fourier": self.fourier}

    def resized(self, kept: Kept) -> Self:
        """Return a method of the same options that holds other prompts, their values still to be set."""
        return type(self)(self.dimensions, kept, fourier=self.fourier, dropout=self.dropout)
