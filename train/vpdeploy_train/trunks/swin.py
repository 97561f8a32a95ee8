"""Swin transformers: every window attends to the block's prefix besides its own tokens.

The relative position bias and the mask between shifted regions are zero for the prefix's columns, as in VPT's published
Swin (arXiv 2203.12119, section 3.2 and appendix): a prompt is at no place, and belongs to every region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    checkpoint_filter_fn,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from vpdeploy.format.task import Stage
from vpdeploy_train.trunks.trunk import Prefix, Trunk


class SwinTrunk(Trunk):
    """A Swin transformer: tokens are [B, height, width, D], and each stage has its own width and heads.

    A stage's patch merging runs before its first block. The feature is the mean over the image's own tokens.
    """

    model_type: ClassVar[type[nn.Module]] = SwinTransformer

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """Say what of a ``SwinTransformer`` prompts cannot enter; None if nothing is."""
        if type(model.patch_embed) is not PatchEmbed:
            return f"its patches come from a {type(model.patch_embed).__name__}, not from one projection"
        if model.dynamic_img_size:
            return "its image size is not fixed"
        if len({*model.patch_embed.img_size}) > 1:
            return f"its images are not square ({model.patch_embed.img_size})"
        for block in (block for stage in model.layers for block in stage.blocks):
            if type(block) is not SwinTransformerBlock:
                return f"its blocks are {type(block).__name__}"
            if type(block.attn) is not WindowAttention:
                return f"its attention is {type(block.attn).__name__}"
            if block.attn.qkv.out_features != 3 * block.dim:
                return "its heads are not as wide as its tokens together"
        return None

    def timm_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return published tensors under timm's names, position biases interpolated to the model's windows."""
        converted: dict[str, Tensor] = checkpoint_filter_fn(state, self.model)
        return converted

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The L blocks of all stages."""
        return [block for stage in self.model.layers for block in stage.blocks]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, each with the width and heads of its blocks."""
        return tuple(
            Stage(depth=len(stage.blocks), width=stage.blocks[0].dim, heads=stage.blocks[0].attn.num_heads)
            for stage in self.model.layers
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised images [B, 3, H, W] into the map of patches, [B, height, width, D]."""
        tokens: Tensor = self.model.patch_embed(pixels)
        return tokens

    def merging(self, index: int) -> nn.Module | None:
        """Return the patch merging that runs before block ``index``; None where there is none."""
        for stage in self.model.layers:
            if index == 0:
                return None if isinstance(stage.downsample, nn.Identity) else stage.downsample
            index -= len(stage.blocks)
            if index < 0:
                return None
        return None

    def enter(self, index: int, tokens: Tensor) -> Tensor:
        """Merge patches where block ``index`` opens a stage: four tokens become one of twice the width."""
        merging = self.merging(index)
        if merging is None:
            return tokens
        merged: Tensor = merging(tokens)
        return merged

    def run(self, index: int, tokens: Tensor, prefix: Prefix | None, *, first_row_only: bool = False) -> Tensor:
        """Run block ``index`` on a map of tokens, [B, height, width, D]."""
        # Attention in windows, MLP, and a residual around each, [B, height, width, D].
        block: Any = self.blocks[index]
        tokens = tokens + _attend_windows(block, block.norm1(tokens), prefix)
        output: Tensor = tokens + block.mlp(block.norm2(tokens))
        return output

    def project(self, index: int, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of prompt tokens in block ``index``, each [..., H, T, d]."""
        block: Any = self.blocks[index]
        attention, width = block.attn, block.dim
        bias = None if attention.qkv.bias is None else attention.qkv.bias[width:]
        pair = F.linear(block.norm1(prompts), attention.qkv.weight[width:], bias)
        key, value = pair.unflatten(-1, (2, attention.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return key, value

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled feature, [B, D], as timm does."""
        feature: Tensor = self.model.forward_head(self.model.norm(tokens), pre_logits=True)
        return feature


def window_bias(block: Any) -> Tensor:
    """Return what a block adds to its windows' logits: relative position bias and shift mask, [1 or W, H, A, A].

    Args:
        block: A ``SwinTransformerBlock``; W is its number of windows where it is shifted, A the tokens of a window.
    """
    bias: Tensor = block.attn._get_rel_pos_bias()
    return bias if block.attn_mask is None else bias + block.attn_mask[:, None]


def _attend_windows(block: Any, normalised: Tensor, prefix: Prefix | None) -> Tensor:
    """Return the attention's output, [B, height, width, D]; window, shift and padding are the block's own."""
    attention = block.attn
    batch, height, width, _ = normalised.shape
    shift, window = block.shift_size, block.window_size

    # Shift, pad, and part into W windows of A tokens: [B, W, A, D].
    padding = [-side % step for side, step in zip((height, width), window, strict=True)]
    shifted = torch.roll(normalised, shifts=(-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else normalised
    shifted = F.pad(shifted, (0, 0, 0, padding[1], 0, padding[0]))
    windows = window_partition(shifted, window).flatten(1, 2).unflatten(0, (batch, -1))

    # Query, key and value, [B, W, H, A, d], and what the block adds to the logits, [1, 1 or W, H, A, A].
    query, key, value = attention.qkv(windows).unflatten(-1, (3, attention.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    mask = window_bias(block).to(query.dtype)[None]

    # The prefix stands before every window's own keys and values, [B, W, H, P + A, d]; its columns have its bias alone.
    if prefix is not None:
        length, count = prefix.key.shape[-2], windows.shape[1]
        key = torch.cat([_for_windows(prefix.key, batch, count, key), key], dim=3)
        value = torch.cat([_for_windows(prefix.value, batch, count, value), value], dim=3)
        mask = F.pad(mask, (length, 0))
        if prefix.bias is not None:
            columns = F.pad(prefix.bias.to(mask.dtype), (0, mask.shape[-1] - length))
            mask = mask + (columns if columns.dim() == 1 else columns[:, None, None, None])

    # Attention [B, W, H, A, d], heads side by side, output projection: [B·W, A, D].
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    mixed = attention.proj(mixed.transpose(2, 3).flatten(3)).flatten(0, 1)

    # The windows back into a map, without padding and shift.
    shifted = window_reverse(mixed, window, height + padding[0], width + padding[1])[:, :height, :width]
    return torch.roll(shifted, shifts=shift, dims=(1, 2)) if any(shift) else shifted


def _for_windows(columns: Tensor, batch: int, count: int, like: Tensor) -> Tensor:
    """Repeat keys or values [H, P, d] or [B, H, P, d] for every window: [B, W, H, P, d]."""
    columns = columns.to(like.dtype)
    columns = columns[:, None] if columns.dim() == 4 else columns
    return columns.expand(batch, count, *columns.shape[-3:])
