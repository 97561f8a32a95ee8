"""Importance of prompt tokens, key/value prompts and segments.

E²VPT (arXiv 2307.13770, eq. 7-8): S = E |∂L/∂ρ|, where the mask variable ρ, fixed at 1, multiplies a token or a
segment. Because ρ multiplies the prompt, ∂L/∂ρ = Σ P ⊙ ∂L/∂P over the channels that ρ covers: one backward pass gives
all scores, and no mask variable is needed. The expectation runs over batches, of the absolute value (a mean of signed
gradients would cancel, and rank the most useful tokens last).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy.errors import SpecError, TrainingError
from vpdeploy_train.methods.e2vpt import E2VPT, gather_segments
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.settings import PruneScope


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Importance by block; larger matters more.

    Attributes:
        tokens: For each block, [T].
        kv_tokens: For each block, [T_KV].
        segments: For each block, [T, R].
    """

    tokens: list[Tensor]
    kv_tokens: list[Tensor]
    segments: list[Tensor]


def prunable_method(model: PromptedViT) -> E2VPT:
    """Return a model's prompts if they can be pruned.

    Raises:
        SpecError: The method has no prompts to prune.
    """
    if not isinstance(model.method, E2VPT):
        raise SpecError(f"{type(model.method).__name__} has no prompts to prune")
    return model.method


def score_prompts(
    model: PromptedViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    scope: PruneScope,
    on_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Score every prompt token, key/value prompt and segment of a trained model.

    Nothing is trained: the model is in eval mode and no optimizer runs.

    Args:
        model: Its method must be ``E2VPT``.
        batches: Normalised images [B, 3, H, W] and labels [B].
        scope: ``shared`` scores one mask that acts on all blocks at once; every block then has the same scores.
        on_batch: Called after every batch.

    Raises:
        SpecError: The method has no prompts to prune.
        TrainingError: A gradient is not finite.
    """
    method = prunable_method(model)
    model.eval()
    totals: list[list[Tensor]] = []
    count = 0
    for pixels, labels in batches:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(pixels), labels).backward()
        gradients = _mask_gradients(method, scope)
        if not totals:
            totals = [[torch.zeros_like(block) for block in kind] for kind in gradients]
        for kind, sums in zip(gradients, totals, strict=True):
            for block, total in zip(kind, sums, strict=True):
                total += block.abs()
        count += 1
        on_batch()
    model.zero_grad(set_to_none=True)
    if not totals:
        raise SpecError("no images to score the prompts on")
    if not all(torch.isfinite(total).all() for kind in totals for total in kind):
        raise TrainingError("an importance score is not finite; train with a lower --lr or --precision fp32")
    tokens, kv_tokens, segments = ([total / count for total in kind] for kind in totals)
    return Scores(tokens=tokens, kv_tokens=kv_tokens, segments=segments)


def _mask_gradients(method: E2VPT, scope: PruneScope) -> list[list[Tensor]]:
    """Return ∂L/∂ρ of token, key/value and segment masks, a tensor for each block."""
    depth = method.dimensions.depth
    by_channel = [_product(method.visual[index]) for index in range(depth)]
    tokens = [block.sum(-1) for block in by_channel]
    segments = [gather_segments(block, method.segment_order) for block in by_channel]
    kv_tokens = [_product(method.kv[index]).sum((0, 2)) for index in range(depth)]
    if method.kv_value is not None:
        kv_tokens = [block + _product(method.kv_value[index]).sum((0, 2)) for index, block in enumerate(kv_tokens)]
    kinds = [tokens, kv_tokens, segments]
    if scope == "shared":
        kinds = [[torch.stack(kind).sum(0)] * depth for kind in kinds]
    return kinds


def _product(parameter: Tensor) -> Tensor:
    """Return the parameter times its gradient, element by element; zeros where it has none (it is empty)."""
    if parameter.grad is None:
        return torch.zeros_like(parameter).detach()
    return (parameter * parameter.grad).detach()
