"""Attention of the class token alone, without the other tokens' keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpdeploy_export.precision.islands import cast
from vpdeploy_export.precision.probe import Place


class ClassTokenAttention(nn.Module):
    """Attention of one row, with one query a head, to all tokens.

    With x the normalised tokens and p the attention's weights, q (x W_kᵀ + b_k)ᵀ = (q W_k) xᵀ + q b_k and
    p (x W_vᵀ + b_v) = (p x) W_vᵀ + (Σ p) b_v. Carrying the query to the tokens, and what it gathers there back, takes
    2 H N D multiply-accumulates; keys and values of all tokens take 2 N D². Both give
    the same numbers up to rounding.

    Args:
        key: The key projection, of weight [D, D].
        value: The value projection.
        heads: The number of heads, H.
    """

    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor

    def __init__(self, key: nn.Linear, value: nn.Linear, heads: int) -> None:
        super().__init__()
        shape = (heads, key.out_features // heads)
        self.register_buffer("key_weight", key.weight.detach().unflatten(0, shape).contiguous())  # [H, d, D]
        self.register_buffer("key_bias", key.bias.detach().unflatten(0, shape)[..., None].contiguous())  # [H, d, 1]
        turned = value.weight.detach().unflatten(0, shape).transpose(1, 2)
        self.register_buffer("value_weight", turned.contiguous())  # [H, D, d]
        self.register_buffer("value_bias", value.bias.detach().unflatten(0, shape)[:, None].contiguous())  # [H, 1, d]
        self.carried, self.logits, self.gathered = Place(), Place(), Place()

    def forward(
        self, query: Tensor, tokens: Tensor, prefix: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> Tensor:
        """Return softmax(q kᵀ + bias) v.

        Args:
            query: The class token's query, [B, H, 1, d], scaled.
            tokens: The normalised rows that become keys and values, [B, M, D].
            prefix: Keys and values that are not made of rows, [1 or B, H, P, d] each.
            bias: What is added to the logits, float32 [1 or B, P + M]; None means zero.

        Returns:
            What the class token takes from all columns, [B, H, 1, d].
        """
        # Carry the query to the tokens, [B, H, D], and compare it with them there: logits [B, H, M].
        dtype = self.key_weight.dtype
        carried = self.carried((query @ self.key_weight)[:, :, 0])
        logits = carried @ tokens.transpose(1, 2) + (query @ self.key_bias)[:, :, 0]

        # Without a prefix, gather the tokens by weight, [B, H, D], and carry that back; the weights add up to 1.
        if prefix is None:
            weights = _softmax(self.logits(logits), bias)
            gathered = self.gathered(cast(weights, dtype) @ tokens)
            mixed: Tensor = gathered[:, :, None] @ self.value_weight + self.value_bias
            return mixed

        # With one, a single softmax over both, float32 [B, H, P + M].
        key, value = prefix
        length = key.shape[2]
        on_prefix = (query @ key.transpose(-2, -1))[:, :, 0]
        weights = _softmax(self.logits(torch.cat([on_prefix, logits], dim=-1)), bias)

        # The tokens' part carries the share of the bias that its weights add up to; the prefix's values stand ready.
        on_tokens = weights[..., length:]
        gathered = self.gathered(cast(on_tokens, dtype) @ tokens)
        share = cast(on_tokens.sum(-1, keepdim=True), dtype)[..., None]
        mixed = gathered[:, :, None] @ self.value_weight + share * self.value_bias
        return mixed + cast(weights[..., :length], dtype)[:, :, None] @ value


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Return the weights of all columns, float32 [B, H, columns]."""
    logits = cast(logits, torch.float32)
    return (logits if bias is None else logits + bias[:, None]).softmax(-1)
