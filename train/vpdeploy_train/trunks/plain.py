"""Plain vision transformers: timm's ``VisionTransformer`` of standard blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vpdeploy_train.trunks.attention import attend
from vpdeploy_train.trunks.rows import RowTrunk
from vpdeploy_train.trunks.trunk import Prefix


class PlainTrunk(RowTrunk):
    """A plain ViT; class token or average pooling, registers, layer scale, QK norm and pre-norm are the model's."""

    model_type: ClassVar[type[nn.Module]] = VisionTransformer

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """Say what of a ``VisionTransformer`` is not plain; None if all is."""
        if odd := [block for block in model.blocks if type(block) is not Block]:
            return f"its blocks are {type(odd[0]).__name__}"
        if odd := [block.attn for block in model.blocks if type(block.attn) is not Attention]:
            return f"its attention is {type(odd[0]).__name__}"
        return cls.refusal_of_rows(model)

    def timm_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return published tensors under timm's names, positions interpolated to the model's grid."""
        converted: dict[str, Tensor] = checkpoint_filter_fn(state, self.model)
        return converted

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised images [B, 3, H, W] into tokens [B, N, D], as timm does."""
        model = self.model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
        return tokens

    def run(self, index: int, tokens: Tensor, prefix: Prefix | None, *, first_row_only: bool = False) -> Tensor:
        """Run block ``index``, all its own parts (layer scale, QK norm, MLP) as they are."""
        block = self.model.blocks[index]
        attention: Attention = block.attn
        # Rows that the block computes, M = N or 1; query [B, H, M, d], key and value of all rows [B, H, N, d].
        rows = tokens[:, :1] if first_row_only else tokens
        query, key, value = _project_tokens(attention, block.norm1(tokens), first_row_only=first_row_only)

        # Attention [B, H, M, d], heads side by side [B, M, D], output projection, first residual.
        mixed = attend(query, key, value, prefix)
        mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
        rows = rows + block.ls1(attention.proj(mixed))

        # MLP and second residual, [B, M, D].
        output: Tensor = rows + block.ls2(block.mlp(block.norm2(rows)))
        return output

    def project(self, index: int, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that block ``index`` would give to prompt tokens, each [..., H, T, d]."""
        block = self.model.blocks[index]
        attention: Attention = block.attn
        width = attention.attn_dim
        bias = None if attention.qkv.bias is None else attention.qkv.bias[width:]
        pair = F.linear(block.norm1(prompts), attention.qkv.weight[width:], bias)
        pair = pair.unflatten(-1, (2, attention.num_heads, attention.head_dim)).movedim(-3, 0).transpose(-3, -2)
        return attention.k_norm(pair[0]), pair[1]


def _project_tokens(attention: Attention, normalised: Tensor, *, first_row_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [B, H, rows, d]; the query has one row if ``first_row_only``."""
    heads, head_width, width = attention.num_heads, attention.head_dim, attention.attn_dim
    # All rows: one product gives the three.
    if not first_row_only:
        parts = attention.qkv(normalised).unflatten(-1, (3, heads, head_width)).permute(2, 0, 3, 1, 4)
        return attention.q_norm(parts[0]), attention.k_norm(parts[1]), parts[2]

    # Row 0 alone: its query [B, 1, D] by a part of the weight, keys and values [B, N, 2D] by the rest.
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(normalised[:, :1], weight[:width], None if bias is None else bias[:width])
    pair = F.linear(normalised, weight[width:], None if bias is None else bias[width:])

    # Into heads.
    query = query.unflatten(-1, (heads, head_width)).transpose(1, 2)
    pair = pair.unflatten(-1, (2, heads, head_width)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(pair[0]), pair[1]
