"""E²VPT's prompts: those of VPT-deep under masks of tokens and segments, and key/value prompts inside the layers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.names import KEY_VALUE_PROMPTS, LAYERS, TRANSFORMER
from vpdeploy_train.importing.reference import ImportedPrompts, ReferenceFormat
from vpdeploy_train.importing.visual import project, projects, read_all
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.methods.method import PromptDimensions

TOKEN_MASK: Final = f"{TRANSFORMER}.prompt_soft_tokens_mask_cls_token"
SEGMENT_MASK: Final = f"{TRANSFORMER}.prompt_soft_tokens_pieces_mask_cls_token"


def read_e2vpt(checkpoint: Checkpoint, dimensions: PromptDimensions) -> ImportedPrompts:
    """Take E²VPT's prompts and fold the masks, which may be real-valued, into them.

    A masked token is a zero vector that is still attended to, so all tokens are kept; compiling merges the zeros of a
    block into one column. Segments that a mask zeroes are noted as pruned, which computes the same.

    Raises:
        SpecError: A tensor is missing or of another shape.
    """
    depth, stage = dimensions.depth, dimensions.blocks[0]
    prompts = read_all(checkpoint, depth, stage.width)
    _, tokens, prompt_width = prompts.shape
    mask = _segment_mask(checkpoint, tokens, prompt_width)
    # The public code's segment r of R holds the channels {r, r + R, ...}.
    factors = mask.repeat(1, prompt_width // mask.shape[1])
    visual = project(checkpoint, prompts.double() * factors, stage.width)
    key_values = _key_values(checkpoint, dimensions)
    kept = Kept.everything(depth, tokens, 0 if key_values is None else key_values[0].shape[1])
    if mask.shape[1] == SEGMENTS and not projects(checkpoint):
        rows = tuple(tuple(bool(flag) for flag in row) for row in (mask != 0).tolist())
        kept = Kept(tokens=kept.tokens, kv_tokens=kept.kv_tokens, segments=(rows,) * depth)
    method = E2VPT(dimensions, kept, segment_order="strided")
    values = {f"visual.{index}": block for index, block in enumerate(visual)}
    if key_values is not None:
        values |= {f"kv.{index}": block for index, block in enumerate(key_values)}
    method.load_state_dict({**method.state_dict(), **values}, strict=True)
    return ImportedPrompts(method="e2vpt", module=method)


def read_heads(checkpoint: Checkpoint, width: int) -> int | None:
    """Return the heads of the key/value prompts, None where there are no such prompts.

    Raises:
        SpecError: They do not divide the width into their own head width.
    """
    key = f"{LAYERS}.0.{KEY_VALUE_PROMPTS}"
    if key not in checkpoint:
        return None
    heads, _, head_width = checkpoint.take(key, "H", "T_KV", "d").shape
    if heads * head_width != width:
        raise SpecError(
            f"{checkpoint.source}: '{key}' has {heads} heads of width {head_width}, which do not make the token width "
            f"{width}; the file does not belong together"
        )
    return heads


def _segment_mask(checkpoint: Checkpoint, tokens: int, width: int) -> Tensor:
    """Return the product of both masks, float64 [T, R]; a mask that is not stored is 1."""
    mask = torch.ones(tokens, SEGMENTS if width % SEGMENTS == 0 else 1, dtype=torch.float64)
    if SEGMENT_MASK in checkpoint:
        mask = checkpoint.take(SEGMENT_MASK, tokens, "R").double()
        if width % mask.shape[1]:
            raise SpecError(
                f"{checkpoint.source}: '{SEGMENT_MASK}' has {mask.shape[1]} segments, into which prompts of width "
                f"{width} cannot be divided"
            )
    if TOKEN_MASK in checkpoint:
        mask = mask * checkpoint.take(TOKEN_MASK, tokens).double()[:, None]
    return mask


def _key_values(checkpoint: Checkpoint, dimensions: PromptDimensions) -> list[Tensor] | None:
    """Return every layer's key/value prompts, each [H, T_KV, d], or None where no layer has any."""
    keys = [f"{LAYERS}.{index}.{KEY_VALUE_PROMPTS}" for index in range(dimensions.depth)]
    if not any(key in checkpoint for key in keys):
        return None
    found: list[Tensor] = []
    for key, stage in zip(keys, dimensions.blocks, strict=True):
        length = found[0].shape[1] if found else "T_KV"
        found.append(checkpoint.take(key, stage.heads, length, stage.head_width))
    return found


FORMAT: Final = ReferenceFormat(
    title="E²VPT",
    marks=(KEY_VALUE_PROMPTS, TOKEN_MASK, SEGMENT_MASK),
    read=read_e2vpt,
    heads=read_heads,
)
