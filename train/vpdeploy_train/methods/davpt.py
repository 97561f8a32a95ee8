"""DA-VPT (arXiv 2505.23694): prompts of unit length, which a loss in training draws towards classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy_train.methods.e2vpt import VPTDeep
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.methods.options import DeepOptions
from vpdeploy_train.option import NOT_NEGATIVE, option

if TYPE_CHECKING:
    from typing_extensions import Self

    from vpdeploy_train.trunks import Trunk

_SHARPNESS = 32.0
_MARGIN = 0.1
_ROUNDS = 3
_TEMPERATURE = 0.05


class DAVPT(VPTDeep):
    """Visual prompts P[l] (T, D) of every block l, which enter at unit length: prompts[l] = P[l] / ‖P[l]‖₂, by token.

    While training, a metric loss draws each prompt towards the images of the classes that it stands for, and away from
    all others. Deployment has nothing of it: what is left are plain prompts.

    For one block, let p_t be prompt t and x_i the mean of image i's patch rows at the block's input, minus the batch's
    mean; both after a LayerNorm without affine, s their cosine, y_i a label, and a(c) the prompt of class c. This is
    the proxy-anchor loss (arXiv 2003.13911, eq. 4) with prompts as proxies, α = 32, δ = 0.1:

        loss = 1/|T⁺| Σ_{t ∈ T⁺} log(1 + Σ_{i: a(y_i) = t} exp(-α (s(x_i, p_t) - δ)))
             + 1/T    Σ_t        log(1 + Σ_{i: a(y_i) ≠ t} exp( α (s(x_i, p_t) + δ)))

    T⁺ are the prompts that have a class in the batch. The mean over the blocks, times ``davpt_weight``, is added to the
    cross-entropy.

    Classes are assigned to prompts anew in every step: by the cosine of the class's mean x in the batch with every
    prompt, balanced by three rounds of Sinkhorn's scaling (arXiv 2006.09882, section 3.1), so that no prompt takes all.

    Where the paper, as we read it, does otherwise: it groups the classes by k-means over their features in the whole
    training set, once in an epoch, weighs patches by attention instead of averaging them, has a second term between
    prompts and the class token, and also trains biases of the backbone. Here nothing has to be stored or resumed, and
    the backbone stays frozen and shared. Pruning, of whole tokens, is ours.

    Args:
        dimensions: Sizes taken from the backbone.
        kept: Which prompts there are.
        weight: Of the metric loss; 0 leaves it out.
        options: As ``E2VPT`` takes them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DeepOptions):
        """What a user can choose."""

        davpt_weight: float = option(0.1, "weight of the metric loss in training", limits=NOT_NEGATIVE)

    parts = frozenset({"tokens"})

    def __init__(self, dimensions: PromptDimensions, kept: Kept, *, weight: float = 0.0, **options: Any) -> None:
        super().__init__(dimensions, kept, **options)
        self.weight = weight
        self._noted: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def create(cls, dimensions: PromptDimensions, options: Any, generator: torch.Generator) -> Self:
        """Return fresh prompts of the length chosen."""
        chosen: DAVPT.Options = options
        return cls(
            dimensions,
            Kept.everything(dimensions.depth, chosen.prompt_tokens, 0),
            weight=chosen.davpt_weight,
            dropout=chosen.prompt_dropout,
            generator=generator,
        )

    def rows(self, index: int) -> Tensor:
        """Return block ``index``'s prompts as they enter, [T, D]: at unit length, then masked."""
        rows = F.normalize(self.visual[index], dim=-1)
        return rows if self.masks is None else rows * self.masks.tokens[index][:, None]

    def prompts(self, index: int, trunk: Trunk, tokens: Tensor) -> Tensor | None:
        """Return block ``index``'s prompts, [T, D]; while training, note them and the patches for the metric loss."""
        if self.training and self.weight and self.kept.tokens[index]:
            patches = tokens.flatten(1, -2) if trunk.grid is None else trunk.patches(tokens)
            self._noted[index] = (_direction(patches).mean(1), _direction(self.rows(index)))
        return super().prompts(index, trunk, tokens)

    def training_loss(self, labels: Tensor) -> Tensor | None:
        """Return the metric loss of the last forward pass, a scalar; None where it has no weight.

        Args:
            labels: [B], of that pass.
        """
        noted, self._noted = self._noted, {}
        if not noted:
            return None
        return self.weight * torch.stack([metric_loss(*each, labels) for each in noted.values()]).mean()

    def resized(self, kept: Kept) -> Self:
        """Return a method of the same options that holds other prompts, their values still to be set."""
        return type(self)(self.dimensions, kept, weight=self.weight, dropout=self.dropout)


def metric_loss(features: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
    """Return the proxy-anchor loss of one block's prompts, a scalar; the formula stands at ``DAVPT``.

    Args:
        features: x before the batch's mean is taken off, [B, D].
        prompts: p, [T, D].
        labels: [B].
    """
    # Cosines of every image with every prompt, [B, T].
    centred = F.normalize(features - features.mean(0), dim=-1)
    proxies = F.normalize(prompts, dim=-1)
    cosines = centred @ proxies.T

    # Each image's prompt is that of its class, [B, T] of 0 and 1.
    classes, numbers = labels.unique(return_inverse=True)
    members = F.one_hot(numbers, len(classes)).to(cosines.dtype)
    assigned = assign_classes((members.T @ cosines / members.sum(0)[:, None]).detach())
    mine = F.one_hot(assigned[numbers], len(prompts)).bool()

    # log(1 + Σ exp z) is the logarithm of a sum of exponentials that has a zero among its terms.
    near = _log_one_plus_sum((-_SHARPNESS * (cosines - _MARGIN)).masked_fill(~mine, -torch.inf))
    far = _log_one_plus_sum((_SHARPNESS * (cosines + _MARGIN)).masked_fill(mine, -torch.inf))
    return near.sum() / mine.any(0).sum() + far.mean()


def assign_classes(similarity: Tensor) -> Tensor:
    """Return the prompt of each class, [K]: similar ones, but every prompt with about as many classes as the others.

    Args:
        similarity: Of each class with each prompt, [K, T].
    """
    plan = (similarity / _TEMPERATURE).softmax(1)
    for _ in range(_ROUNDS):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan.argmax(1)


def _direction(rows: Tensor) -> Tensor:
    """Return rows [..., D] after a LayerNorm without affine, in float32 or better."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.layer_norm(rows, rows.shape[-1:])


def _log_one_plus_sum(exponents: Tensor) -> Tensor:
    """Return log(1 + Σ_i exp(z_i)) for each column, [T], from [B, T]."""
    return torch.cat([torch.zeros_like(exponents[:1]), exponents]).logsumexp(0)
