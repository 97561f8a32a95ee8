"""Attention whose keys and values are preceded by a prefix: the one place where prompts meet the backbone.

In VPT-deep and E²VPT every block discards its prompt outputs, so of a prompt row only its key and its value matter.
With q, k, v of the real tokens and a prefix (K_p, V_p, b):

    softmax([q K_pᵀ + b ; q kᵀ] / √d) [V_p ; v]

which equals running the prompts as tokens exactly (the bias is in logit units, added after the scaling).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values that precede those of a block's tokens.

    Attributes:
        key: [H, P, d], or [B, H, P, d] where they depend on the image.
        value: As ``key``.
        bias: Added to the attention logits of the prefix, [P] or [B, P]; None means zero.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


def project_prompts(block: Block, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the keys and values that a block would give to prompt tokens.

    ``K = heads(W_k LN(P) + b_k)``, ``V = heads(W_v LN(P) + b_v)`` with the block's own frozen norm and projections
    (VPT, arXiv 2203.12119, eq. 4-5, restricted to what reaches other tokens).

    Args:
        block: A timm block with a fused qkv projection.
        prompts: [..., T, D].

    Returns:
        Key and value, each [..., H, T, d].
    """
    attention: Attention = block.attn
    normalised = block.norm1(prompts)
    width = attention.attn_dim
    bias = None if attention.qkv.bias is None else attention.qkv.bias[width:]
    pair = F.linear(normalised, attention.qkv.weight[width:], bias)
    pair = pair.unflatten(-1, (2, attention.num_heads, attention.head_dim)).movedim(-3, 0).transpose(-3, -2)
    return attention.k_norm(pair[0]), pair[1]


def run_block(block: Block, tokens: Tensor, prefix: Prefix | None, *, first_row_only: bool = False) -> Tensor:
    """Run a timm block on tokens that also attend to a prefix.

    Args:
        block: A timm block; all its own parts (layer scale, QK norm, MLP) are used as they are.
        tokens: [B, N, D].
        prefix: Keys and values to attend to besides the tokens' own, or None.
        first_row_only: Compute queries, output projection and MLP for row 0 alone; keys and values still come from all
            rows. Exact for the last block of a model that reads its class token only.

    Returns:
        [B, N, D], or [B, 1, D] if ``first_row_only``.
    """
    attention: Attention = block.attn
    normalised = block.norm1(tokens)
    rows = tokens[:, :1] if first_row_only else tokens
    query, key, value = _project_tokens(attention, normalised, first_row_only=first_row_only)
    mixed = attend(query, key, value, prefix)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
    rows = rows + block.ls1(attention.proj(mixed))
    output: Tensor = rows + block.ls2(block.mlp(block.norm2(rows)))
    return output


def attend(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None) -> Tensor:
    """Attend to a prefix and to the tokens' own keys and values.

    Args:
        query: [B, H, M, d], unscaled.
        key: [B, H, N, d].
        value: [B, H, N, d].
        prefix: What precedes ``key`` and ``value``, or None.

    Returns:
        [B, H, M, d].
    """
    mask = None
    if prefix is not None:
        batch, heads, tokens, _ = key.shape
        length = prefix.key.shape[-2]
        key = torch.cat([prefix.key.to(key.dtype).expand(batch, heads, length, -1), key], dim=2)
        value = torch.cat([prefix.value.to(value.dtype).expand(batch, heads, length, -1), value], dim=2)
        if prefix.bias is not None:
            bias = F.pad(prefix.bias.to(query.dtype), (0, tokens))
            mask = bias.expand(batch, -1)[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _project_tokens(attention: Attention, normalised: Tensor, *, first_row_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [B, H, rows, d]; the query has one row if ``first_row_only``."""
    heads, head_width, width = attention.num_heads, attention.head_dim, attention.attn_dim
    if not first_row_only:
        parts = attention.qkv(normalised).unflatten(-1, (3, heads, head_width)).permute(2, 0, 3, 1, 4)
        return attention.q_norm(parts[0]), attention.k_norm(parts[1]), parts[2]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(normalised[:, :1], weight[:width], None if bias is None else bias[:width])
    pair = F.linear(normalised, weight[width:], None if bias is None else bias[width:])
    query = query.unflatten(-1, (heads, head_width)).transpose(1, 2)
    pair = pair.unflatten(-1, (2, heads, head_width)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(pair[0]), pair[1]
