"""Attention whose keys and values are preceded by a prefix: the one place where prompts meet the backbone.

In VPT-deep, E²VPT and VAPT every block discards its prompt outputs, so of a prompt row only its key and its value
matter. With q, k, v of the real tokens and a prefix (K_p, V_p, b):

    softmax([q K_pᵀ + b ; q kᵀ] / √d) [V_p ; v]

which equals running the prompts as tokens exactly (the bias is in logit units, added after the scaling).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vpdeploy_train.trunks.trunk import Prefix


def attend(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None, *, scale: float | None = None) -> Tensor:
    """Attend to a prefix and to the tokens' own keys and values.

    Args:
        query: The queries, [B, H, M, d], unscaled.
        key: The tokens' keys, [B, H, N, d].
        value: The tokens' values, [B, H, N, d].
        prefix: The keys and values that precede the tokens', or None.
        scale: What the logits are multiplied by; None means 1/√d.

    Returns:
        What each query takes from prefix and tokens, [B, H, M, d].
    """
    # Keys and values of the prefix come first, [B, H, P + N, d]; its bias is the only one, [B, 1, 1, P + N].
    mask = None
    if prefix is not None:
        batch, heads, tokens, _ = key.shape
        length = prefix.key.shape[-2]
        key = torch.cat([prefix.key.to(key.dtype).expand(batch, heads, length, -1), key], dim=2)
        value = torch.cat([prefix.value.to(value.dtype).expand(batch, heads, length, -1), value], dim=2)
        if prefix.bias is not None:
            bias = F.pad(prefix.bias.to(query.dtype), (0, tokens))
            mask = bias.expand(batch, -1)[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
