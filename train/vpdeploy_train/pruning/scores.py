"""Importance of prompt tokens, key/value prompts, segments and hidden units.

E²VPT (arXiv 2307.13770, eq. 7-8): S = E |∂L/∂ρ|, where the mask variable ρ, fixed at 1, multiplies what is scored. The
masks are never trained and only their gradients are read. The expectation runs over batches, of the absolute value (a
mean of signed gradients would cancel, and rank the most useful tokens last).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy.errors import SpecError, TrainingError
from vpdeploy_train.methods.kept import SEGMENTS, Kept, Masks, PrunableMethod
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import PruneScope


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Importance by block; larger matters more.

    Attributes:
        tokens: Scores of the visual prompts of each block, [T].
        kv_tokens: Scores of the key/value prompts of each block, [T_KV].
        segments: Scores of the segments of each block's visual prompts, [T, R]; zeros where the method has no segments.
        hidden: Scores of the hidden units of a feature projector, [r]; empty where there is none.
    """

    tokens: list[Tensor]
    kv_tokens: list[Tensor]
    segments: list[Tensor]
    hidden: Tensor


def prunable_method(model: PromptedViT) -> PrunableMethod:
    """Return a model's prompts if they can be pruned.

    Raises:
        SpecError: The method has no prompts to prune.
    """
    if not isinstance(model.method, PrunableMethod):
        raise SpecError(f"{type(model.method).__name__} has no prompts to prune")
    return model.method


def score_prompts(
    model: PromptedViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    scope: PruneScope,
    on_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Score every prompt token, key/value prompt, segment and hidden unit of a trained model.

    Nothing is trained: the model is in eval mode and no optimizer runs.

    Args:
        model: The trained model, whose method must be prunable.
        batches: Normalised images [B, 3, H, W] and labels [B].
        scope: ``shared`` scores one mask that acts on all blocks at once; every block then has the same scores.
        on_batch: Is called after every batch.

    Raises:
        SpecError: The method has no prompts to prune.
        TrainingError: A gradient is not finite.
    """
    # Sum |∂L/∂ρ| over the batches, with masks of ones that only gradients are read of.
    method = prunable_method(model)
    model.eval()
    totals: list[list[Tensor]] = []
    count = 0
    for pixels, labels in batches:
        masks = _masks_of_ones(method.kept, pixels)
        with method.masked(masks), torch.enable_grad():
            loss = F.cross_entropy(model(pixels), labels)
        gradients = _gradients(loss, masks, scope)
        totals = totals or [[torch.zeros_like(each) for each in kind] for kind in gradients]
        for kind, sums in zip(gradients, totals, strict=True):
            for gradient, total in zip(kind, sums, strict=True):
                total += gradient.abs()
        count += 1
        on_batch()

    # The expectation is the mean over batches.
    if not totals:
        raise SpecError("no images to score the prompts on")
    if not all(torch.isfinite(total).all() for kind in totals for total in kind):
        raise TrainingError("an importance score is not finite; train with a lower --lr or --precision fp32")
    tokens, kv_tokens, segments, (hidden,) = ([total / count for total in kind] for kind in totals)
    return Scores(tokens=tokens, kv_tokens=kv_tokens, segments=segments, hidden=hidden)


def _masks_of_ones(kept: Kept, pixels: Tensor) -> Masks:
    """Return masks on the images' device and in their precision."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(*shape, device=pixels.device, dtype=pixels.dtype, requires_grad=True)

    return Masks(
        tokens=[ones(len(block)) for block in kept.tokens],
        kv_tokens=[ones(len(block)) for block in kept.kv_tokens],
        segments=[ones(len(block), SEGMENTS) for block in kept.tokens],
        hidden=ones(len(kept.hidden)),
    )


def _gradients(loss: Tensor, masks: Masks, scope: PruneScope) -> list[list[Tensor]]:
    """Return ∂L/∂ρ by kind; where one mask is shared by all blocks, the sum over the blocks for each of them."""
    flat = [mask for kind in masks.all for mask in kind]
    found = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
    remaining = iter(found)
    kinds = [[next(remaining) for _ in kind] for kind in masks.all]
    if scope == "shared":
        *by_block, hidden = kinds
        kinds = [*([torch.stack(kind).sum(0)] * len(kind) for kind in by_block), hidden]
    return kinds
