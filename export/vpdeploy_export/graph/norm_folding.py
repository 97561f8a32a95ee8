"""Folding a norm into the projections behind it, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def without_affine(
    norm: nn.Module, projections: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Move a LayerNorm's gain and shift into the projections that read it.

    W (γ ⊙ x̂ + β) + b = (W diag γ) x̂ + (W β + b). What x̂ is used for besides then needs no norm of its own.

    Args:
        norm: A LayerNorm; a norm of another kind keeps its affine.
        projections: Weight [M, D], and bias [M] or None, of each projection.

    Returns:
        The norm left over, and weight and bias of each projection, float64.
    """
    doubles = []
    for weight, bias in projections:
        constant = torch.zeros(weight.shape[0]) if bias is None else bias.detach()
        doubles.append((weight.detach().double(), constant.double()))
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        return copy.deepcopy(norm), doubles
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, bias=False)
    gain = norm.weight.detach().double()
    shift = torch.zeros_like(gain) if norm.bias is None else norm.bias.detach().double()
    return plain, [(weight * gain, bias + weight @ shift) for weight, bias in doubles]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a frozen float32 layer of weight [M, D] and bias [M]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer
