"""The visual prompts that all formats share: P0, the deeper blocks' prompts, and an optional linear map of both."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.names import TRANSFORMER

FIRST: Final = f"{TRANSFORMER}.prompt_embeddings"
DEEP: Final = f"{TRANSFORMER}.deep_prompt_embeddings"
PROJECTION: Final = f"{TRANSFORMER}.prompt_proj"


def projects(checkpoint: Checkpoint) -> bool:
    """Whether the prompts pass a linear map before they enter."""
    return f"{PROJECTION}.weight" in checkpoint


def read_first(checkpoint: Checkpoint, width: int) -> Tensor:
    """Return block 0's prompts as stored, [T, p]; p is the width D unless the prompts are projected.

    Raises:
        SpecError: They are missing or of another shape.
    """
    return checkpoint.take(FIRST, 1, "T", "p" if projects(checkpoint) else width)[0]


def read_all(checkpoint: Checkpoint, depth: int, width: int) -> Tensor:
    """Return every block's prompts as stored, [L, T, p].

    Raises:
        SpecError: They are missing, of another shape, or of another number of blocks.
    """
    first = read_first(checkpoint, width)
    if depth == 1 and DEEP not in checkpoint:
        return first[None]
    deep = checkpoint.take(DEEP, depth - 1, *first.shape)
    return torch.cat([first[None], deep])


def project(checkpoint: Checkpoint, prompts: Tensor, width: int) -> Tensor:
    """Apply ``prompt_proj`` where there is one: [..., p] to [..., D], in float64, rounded to float32 once.

    Raises:
        SpecError: The map does not fit prompts and backbone.
    """
    if not projects(checkpoint):
        return prompts.float()
    weight = checkpoint.take(f"{PROJECTION}.weight", width, prompts.shape[-1]).double()
    bias = checkpoint.take(f"{PROJECTION}.bias", width).double()
    return torch.nn.functional.linear(prompts.double(), weight, bias).float()
