"""VAPT's prompts: static ones in block 0, and in each further block a generator that reads the image's patches."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.names import TRANSFORMER
from vpdeploy_train.importing.reference import ImportedPrompts, ReferenceFormat
from vpdeploy_train.importing.visual import FIRST
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.methods.vapt import PAPER_EPS, VAPT

_NORM: Final = f"{TRANSFORMER}.deep_prompt_norm"
_DOWNSAMPLE: Final = f"{TRANSFORMER}.deep_prompt_downsample"
_FEATURES: Final = f"{TRANSFORMER}.deep_prompt_embeddings_mlp"


def read_vapt(checkpoint: Checkpoint, dimensions: PromptDimensions) -> ImportedPrompts:
    """Take VAPT's prompts and generators; generator J belongs to block J + 1.

    Raises:
        SpecError: A tensor is missing or of another shape, or the generators were made for another patch grid.
    """
    width, adaptive = dimensions.blocks[0].width, dimensions.depth - 1
    first = checkpoint.take(FIRST, 1, "T", width)[0]
    tokens = len(first)
    down = checkpoint.take(f"{_FEATURES}.block.0.weight", "r", width)
    up = checkpoint.take(f"{_FEATURES}.block.2.weight", width, len(down))
    values = {"first": first, "down": down, "up": up}
    side: int | str = "K"
    for block in range(adaptive):
        downsample = f"{_DOWNSAMPLE}.{block}"
        kernel = checkpoint.take(f"{downsample}.conv.kernel", 1, 1, side, side)[0, 0]
        side = len(kernel)
        linear = checkpoint.take(f"{downsample}.linear.weight", tokens, "n'")
        _require_grid(checkpoint, f"{downsample}.linear.weight", linear, side, dimensions)
        values |= {
            f"norm_weight.{block}": checkpoint.take(f"{_NORM}.{block}.weight", width),
            f"norm_bias.{block}": checkpoint.take(f"{_NORM}.{block}.bias", width),
            f"kernels.{block}": kernel,
            f"linear_weight.{block}": linear,
            f"linear_bias.{block}": checkpoint.take(f"{downsample}.linear.bias", tokens),
        }
    kept = Kept.everything(dimensions.depth, tokens, 0, len(down))
    method = VAPT(dimensions, kept, kernel=side if isinstance(side, int) else 1, eps=PAPER_EPS)
    method.load_state_dict(values, strict=True)
    return ImportedPrompts(method="vapt", module=method)


def _require_grid(checkpoint: Checkpoint, key: str, linear: Tensor, side: int, dimensions: PromptDimensions) -> None:
    """Refuse a token projector that was made for another patch grid: its positions cannot be interpolated."""
    positions, grid = linear.shape[1], dimensions.grid or 0
    outputs = math.isqrt(positions)
    if outputs * outputs != positions:
        raise SpecError(
            f"{checkpoint.source}: '{key}' reads {positions} positions, which are no square grid; only square images "
            "are supported"
        )
    made_for = outputs + side - 1
    if made_for != grid:
        raise SpecError(
            f"{checkpoint.source}: '{key}' reads {positions} positions, so the prompts were learned on a grid of "
            f"{made_for}x{made_for} patches, and the backbone has {grid}x{grid}; without a backbone in the file, give "
            f"--image-size {made_for * dimensions.patch_size}"
        )


FORMAT: Final = ReferenceFormat(
    title="VAPT", marks=("deep_prompt_norm.", "deep_prompt_downsample.", "deep_prompt_embeddings_mlp."), read=read_vapt
)
