"""The deployed graph as torch modules: the backbone with everything foldable folded, typed in its final precision.

Kept apart from the training model on purpose: the parity gate compares the two.

Folded into constants: pixel scaling and normalisation into the patch embedding; its bias and the positions into one
addition; the class token and its position; 1/√d into the query projection. The last block computes the class token's
row only. Softmax, the head and the logits are float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vpdeploy.preprocessing import Preprocessing
from vpdeploy_export.compilation import BlockPrefix
from vpdeploy_export.patch_embedding import ImageInput, PatchEmbedding
from vpdeploy_train.prompted import reads_class_token_only

FUSED_ATTENTION_OPSET = 23
"""From this opset on, attention is written as one ``Attention`` node."""


class GraphBlock(nn.Module):
    """A transformer block whose tokens also attend to a prefix.

    Args:
        block: The frozen block; its parts are copied.
        first_row_only: Compute row 0 only; keys and values still come from all rows.
        fused: Write attention as one operator instead of its parts.
    """

    def __init__(self, block: Block, *, first_row_only: bool, fused: bool) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.first_row_only = first_row_only
        self.fused = fused
        attention = self.block.attn
        self.heads, self.head_width = attention.num_heads, attention.head_dim
        self.width = attention.attn_dim
        # A QK norm stands between projection and scale, so only without one can the scale be folded.
        self.scale = 1.0 if isinstance(attention.q_norm, nn.Identity) else attention.scale
        if self.scale == 1.0:
            with torch.no_grad():
                attention.qkv.weight[: self.width] *= attention.scale
                if attention.qkv.bias is not None:
                    attention.qkv.bias[: self.width] *= attention.scale
        # Three products need no copies to take the parts of one apart.
        self.query = _slice_linear(attention.qkv, 0, self.width)
        self.key = _slice_linear(attention.qkv, self.width, 2 * self.width)
        self.value = _slice_linear(attention.qkv, 2 * self.width, 3 * self.width)
        del attention.qkv

    def forward(self, tokens: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the block.

        Args:
            tokens: [B, N, D].
            key: Prefix keys [1 or B, H, P, d], or None.
            value: As ``key``.
            bias: float32 [1 or B, P] on the prefix's logits; None means zero.

        Returns:
            [B, N, D], or [B, 1, D] if ``first_row_only``.
        """
        attention = self.block.attn
        normalised = self.block.norm1(tokens)
        rows = tokens[:, :1] if self.first_row_only else tokens
        q, k, v = self._project(normalised)
        if key is not None and value is not None:
            k = torch.cat([_repeat(key, tokens), k], dim=2)
            v = torch.cat([_repeat(value, tokens), v], dim=2)
        mixed = self._attend(q, k, v, bias, tokens.shape[1])
        mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
        rows = rows + self.block.ls1(attention.proj(mixed))
        output: Tensor = rows + self.block.ls2(self.block.mlp(self.block.norm2(rows)))
        return output

    def _project(self, normalised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, each [B, H, rows, d]."""
        attention = self.block.attn
        rows = normalised[:, :1] if self.first_row_only else normalised
        query, key, value = (
            part.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)
            for part in (self.query(rows), self.key(normalised), self.value(normalised))
        )
        return attention.q_norm(query), attention.k_norm(key), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, tokens: int) -> Tensor:
        """Return softmax(q kᵀ + bias) v, [B, H, M, d]."""
        mask = None if bias is None else F.pad(bias, (0, tokens))[:, None, None, :]
        if self.fused:
            if mask is not None:
                # ONNX Runtime's CPU kernel wants the mask's query axis at full length.
                mask = mask.to(query.dtype).expand(query.shape[0], 1, query.shape[2], key.shape[2])
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        if self.scale != 1.0:
            query = query * self.scale
        logits = (query @ key.transpose(-2, -1)).float()
        if mask is not None:
            logits = logits + mask
        return logits.softmax(-1).to(value.dtype) @ value


class _Graph(nn.Module):
    """What both graphs share: the backbone up to the pooled feature.

    Args:
        vit: The frozen backbone; its parts are copied.
        preprocessing: Image size, mean and standard deviation.
        dtype: Of weights and matrix products.
        image_input: Form of the ``image`` input.
        opset: From ``FUSED_ATTENTION_OPSET`` on, attention is one operator.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        preprocessing: Preprocessing,
        *,
        dtype: torch.dtype,
        image_input: ImageInput,
        opset: int,
    ) -> None:
        super().__init__()
        last = len(vit.blocks) - 1
        cls_only = reads_class_token_only(vit)
        self.embedding = PatchEmbedding(vit, preprocessing, image_input)
        self.norm_pre = copy.deepcopy(vit.norm_pre)
        self.blocks = nn.ModuleList(
            GraphBlock(block, first_row_only=cls_only and index == last, fused=opset >= FUSED_ATTENTION_OPSET)
            for index, block in enumerate(vit.blocks)
        )
        self.final = _Pooling(vit)
        self.dtype = dtype
        self.requires_grad_(False).eval().to(dtype)

    def features(
        self,
        image: Tensor,
        keys: Sequence[Tensor | None],
        values: Sequence[Tensor | None],
        biases: Sequence[Tensor | None],
    ) -> Tensor:
        """Return the pooled feature, float32 [B, D]; the sequences have one entry for each block."""
        tokens = self.norm_pre(self.embedding(image))
        for block, key, value, bias in zip(self.blocks, keys, values, biases, strict=True):
            tokens = block(tokens, key, value, bias)
        feature: Tensor = self.final(tokens).float()
        return feature


class FoldedGraph(_Graph):
    """One task's graph: prompts and head are constants, every block has the prefix length it needs.

    Args:
        vit: The frozen backbone.
        preprocessing: Image size, mean and standard deviation.
        prefix: For each block.
        head: The trained head.
        dtype: Of weights and matrix products.
        image_input: Form of the ``image`` input.
        opset: ONNX opset that will be written.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        preprocessing: Preprocessing,
        prefix: Sequence[BlockPrefix],
        head: nn.Linear,
        *,
        dtype: torch.dtype,
        image_input: ImageInput,
        opset: int,
    ) -> None:
        super().__init__(vit, preprocessing, dtype=dtype, image_input=image_input, opset=opset)
        for index, block in enumerate(prefix):
            live = block.key.shape[1] > 0
            weighted = bool(live and block.bias.any())
            self._constant(f"prefix_key_{index}", torch.from_numpy(block.key)[None].to(dtype) if live else None)
            self._constant(f"prefix_value_{index}", torch.from_numpy(block.value)[None].to(dtype) if live else None)
            self._constant(f"prefix_bias_{index}", torch.from_numpy(block.bias)[None].float() if weighted else None)
        self.head = copy.deepcopy(head).requires_grad_(False).float()

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, float32 [B, C]."""
        count = len(self.blocks)
        keys = [getattr(self, f"prefix_key_{index}") for index in range(count)]
        values = [getattr(self, f"prefix_value_{index}") for index in range(count)]
        biases = [getattr(self, f"prefix_bias_{index}") for index in range(count)]
        logits: Tensor = self.head(self.features(image, keys, values, biases))
        return logits

    def _constant(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value)


class SwitchableGraph(_Graph):
    """All tasks' graph: each row of a batch takes its prompts and head from its slot of the table."""

    def forward(
        self,
        image: Tensor,
        slot: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        prefix_bias: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
    ) -> Tensor:
        """Compute logits.

        Args:
            image: uint8 [B, H, W, 3].
            slot: int32 [B].
            prefix_key: [S, L, H, P, d].
            prefix_value: [S, L, H, P, d].
            prefix_bias: float32 [S, L, P]; ``MASKED`` for padding.
            head_weight: float32 [S, D, C].
            head_bias: float32 [S, C]; ``MASKED`` for padding.

        Returns:
            Logits, float32 [B, C].
        """
        key, value = prefix_key.index_select(0, slot), prefix_value.index_select(0, slot)
        bias = prefix_bias.index_select(0, slot)
        blocks = range(len(self.blocks))
        feature = self.features(
            image,
            [key[:, index] for index in blocks],
            [value[:, index] for index in blocks],
            [bias[:, index] for index in blocks],
        )
        weight = head_weight.index_select(0, slot)
        return (feature[:, None, :] @ weight)[:, 0] + head_bias.index_select(0, slot)


class _Pooling(nn.Module):
    """Final norm and pooling, by the backbone's own parts."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        # The blocks are left behind: only the parts after them are used and exported.
        blocks, vit.blocks = vit.blocks, nn.Sequential()
        try:
            self.vit = copy.deepcopy(vit)
        finally:
            vit.blocks = blocks
        del self.vit.patch_embed, self.vit.pos_embed, self.vit.cls_token

    def forward(self, tokens: Tensor) -> Tensor:
        feature: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return feature


def _repeat(constant: Tensor, tokens: Tensor) -> Tensor:
    """Repeat a constant [1, ...] for each image; what comes from the table [B, ...] has a row for each already."""
    return constant.expand(tokens.shape[0], -1, -1, -1) if constant.shape[0] == 1 else constant


def _slice_linear(linear: nn.Linear, start: int, end: int) -> nn.Linear:
    """Return a linear layer of some of the outputs of another."""
    part = nn.Linear(linear.in_features, end - start, bias=linear.bias is not None)
    part.weight = nn.Parameter(linear.weight[start:end].detach().clone(), requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias[start:end].detach().clone(), requires_grad=False)
    return part
