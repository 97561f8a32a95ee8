"""Vision transformers with rotary positions: timm's ``Eva`` (EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT).

A rotary position turns the queries and keys of the patches by angles of their place in the image. A prompt has no
place, so its key is not turned: it is treated as timm treats the class token and the registers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import Tensor, nn

from vpdeploy_train.trunks.attention import attend
from vpdeploy_train.trunks.rows import RowTrunk
from vpdeploy_train.trunks.trunk import Prefix


class EvaTrunk(RowTrunk):
    """A pre-norm ViT with rotary or learned positions; layer scale, SwiGLU and inner norms are the model's."""

    model_type: ClassVar[type[nn.Module]] = Eva

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """Say what of an ``Eva`` prompts cannot enter; None if nothing is."""
        if odd := [block for block in model.blocks if type(block) is not EvaBlock]:
            return f"its blocks are {type(odd[0]).__name__}"
        attentions = [block.attn for block in model.blocks]
        if odd := [attention for attention in attentions if type(attention) not in (EvaAttention, AttentionRope)]:
            return f"its attention is {type(odd[0]).__name__}"
        if any(getattr(attention, "num_kv_groups", 1) > 1 for attention in attentions):
            return "its keys and values are shared by groups of heads"
        return cls.refusal_of_rows(model)

    def timm_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return published tensors under timm's names, positions interpolated to the model's grid."""
        converted: dict[str, Tensor] = checkpoint_filter_fn(state, self.model)
        return converted

    def embed(self, pixels: Tensor) -> Tensor:
        """Turn normalised images [B, 3, H, W] into tokens [B, N, D], as timm does."""
        model = self.model
        tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(pixels))[0])
        return tokens

    def rotation(self, index: int) -> Tensor | None:
        """Return sines and cosines of block ``index``'s rotation, [n, 2d] or [H, n, 2d]; None if it has none."""
        model = self.model
        if model.rope is None:
            return None
        stored = hasattr(model.rope, "feat_shape") and not model.dynamic_img_size
        table: Tensor = model.rope.get_embed() if stored else model.rope.get_embed(shape=model.patch_embed.grid_size)
        return table[index] if model.rope_mixed else table

    def run(self, index: int, tokens: Tensor, prefix: Prefix | None, *, first_row_only: bool = False) -> Tensor:
        """Run block ``index``, all its own parts (layer scale, norms, MLP) as they are."""
        block = self.model.blocks[index]
        attention = block.attn

        # Rows that the block computes, M = N or 1; query [B, H, M, d], key and value of all rows [B, H, N, d].
        rows = tokens[:, :1] if first_row_only else tokens
        normalised = block.norm1(tokens)
        weights = projections(attention)
        query = attention.q_norm(_heads(normalised[:, :1] if first_row_only else normalised, *weights[0], attention))
        key = attention.k_norm(_heads(normalised, *weights[1], attention))
        value = _heads(normalised, *weights[2], attention)

        # Rotary positions turn the patches' queries and keys.
        rotation = self.rotation(index)
        if rotation is not None:
            # Row 0 alone is the class token, which is at no place.
            query = query if first_row_only else _rotate(query, rotation, attention)
            key = _rotate(key, rotation, attention)

        # Attention [B, H, M, d], heads side by side [B, M, D], output projection, first residual.
        mixed = attend(query.type_as(value), key.type_as(value), value, prefix)
        mixed = attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2)))
        rows = rows + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)

        # MLP and second residual, [B, M, D].
        hidden = block.mlp(block.norm2(rows))
        output: Tensor = rows + (hidden if block.gamma_2 is None else block.gamma_2 * hidden)
        return output

    def project(self, index: int, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys, not rotated, and values of prompt tokens in block ``index``, each [..., H, T, d]."""
        block = self.model.blocks[index]
        normalised = block.norm1(prompts)
        _, key, value = projections(block.attn)
        return block.attn.k_norm(_heads(normalised, *key, block.attn)), _heads(normalised, *value, block.attn)


def projections(attention: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight [D, D] and bias [D] of query, key and value, which timm keeps in one tensor or in three.

    Args:
        attention: The block's attention, an ``EvaAttention`` or ``AttentionRope``.
    """
    if attention.qkv is None:
        return [(part.weight, part.bias) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    weights = attention.qkv.weight.chunk(3)
    if getattr(attention, "q_bias", None) is not None:
        biases = [attention.q_bias, attention.k_bias, attention.v_bias]
    elif attention.qkv.bias is not None:
        biases = attention.qkv.bias.chunk(3)
    else:
        biases = [None] * 3
    return list(zip(weights, biases, strict=True))


def _heads(rows: Tensor, weight: Tensor, bias: Tensor | None, attention: Any) -> Tensor:
    """Project rows [..., T, D] and split them into heads, [..., H, T, d]."""
    split: Tensor = F.linear(rows, weight, bias).unflatten(-1, (attention.num_heads, attention.head_dim))
    return split.transpose(-3, -2)


def _rotate(rows: Tensor, rotation: Tensor, attention: Any) -> Tensor:
    """Rotate the patches among rows [B, H, N, d]; class token, registers and rows behind the patches stay."""
    first = attention.num_prefix_tokens
    end = first + rotation.shape[-2]
    turned = apply_rot_embed_cat(rows[:, :, first:end], rotation, half=attention.rotate_half)
    return torch.cat([rows[:, :, :first], turned, rows[:, :, end:]], dim=2)
