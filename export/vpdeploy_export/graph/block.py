"""A deployed transformer block over rows of tokens, whatever family its parts come from.

The affine of the norm before the attention, and 1/√d, are folded into the projections; the sines and cosines of
rotary positions are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vpdeploy_export.graph.class_token import ClassTokenAttention
from vpdeploy_export.graph.columns import Columns, GeneratorColumns
from vpdeploy_export.graph.norm_folding import linear, without_affine
from vpdeploy_export.precision.islands import PARTS, IslandPart, cast
from vpdeploy_export.precision.probe import Place


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """Copies of a frozen block's parts; a part that the block does not have is an ``nn.Identity``.

    Attributes:
        norm: The norm before the attention.
        projections: Weight [D, D] and bias [D] or None of query, key and value.
        query_norm: The norm over each head's queries.
        key_norm: The norm over each head's keys.
        mixed_norm: The norm over the heads' outputs, before ``projection``.
        projection: The attention's output projection.
        attention_scale: The layer scale of the attention's branch.
        mlp_norm: The norm before the MLP.
        mlp: The MLP.
        mlp_scale: The layer scale of the MLP's branch.
        heads: The number of heads, H.
        rotation: Sines and cosines of the patches' rotary positions, [n, 2d] or [H, n, 2d]; None where there are none.
        rotates_halves: Whether the rotation pairs channel c with c + d/2; else it pairs it with its neighbour.
        patches: The row of the first patch, and the number of patches.
    """

    norm: nn.Module
    projections: list[tuple[Tensor, Tensor | None]]
    query_norm: nn.Module
    key_norm: nn.Module
    mixed_norm: nn.Module
    projection: nn.Module
    attention_scale: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    mlp_scale: nn.Module
    heads: int
    rotation: Tensor | None = None
    rotates_halves: bool = False
    patches: tuple[int, int]


class RowGraphBlock(nn.Module):
    """A transformer block whose tokens also attend to a prefix and to generated prompts.

    Args:
        parts: The frozen block's parts; this module owns them from now on.
        first_row_only: Whether only row 0 is computed; keys and values still come from all rows.
        fused: Whether attention is written as one operator; else it is written as its parts.
    """

    rotation: Tensor | None

    def __init__(self, parts: BlockParts, *, first_row_only: bool, fused: bool) -> None:
        super().__init__()
        # Sizes.
        self.first_row_only = first_row_only
        self.fused = fused
        self.heads = parts.heads
        self.head_width = parts.projections[0][0].shape[0] // parts.heads
        self.first_patch, self.patch_count = parts.patches
        self.rotates_halves = parts.rotates_halves
        self.register_buffer("rotation", parts.rotation)

        # Projections, with the norm's affine and the logits' scale folded in.
        folded = self.head_width**-0.5
        # A QK norm stands between projection and scale, so only without one can the scale be folded.
        self.scale = 1.0 if isinstance(parts.query_norm, nn.Identity) else folded
        self.norm, projections = without_affine(parts.norm, parts.projections)
        factors = (folded if self.scale == 1.0 else 1.0, 1.0, 1.0)
        # Three products need no copies to take the parts of one apart.
        self.query, self.key, self.value = (
            linear(weight * factor, bias * factor) for (weight, bias), factor in zip(projections, factors, strict=True)
        )

        # The other parts as they are, and the places between them that a probe may look at.
        self.query_norm, self.key_norm, self.mixed_norm = parts.query_norm, parts.key_norm, parts.mixed_norm
        self.projection, self.attention_scale = parts.projection, parts.attention_scale
        self.mlp_norm, self.mlp, self.mlp_scale = parts.mlp_norm, parts.mlp, parts.mlp_scale
        self.logits, self.generated, self.generator_hidden = Place(), Place(), Place()

        # A norm or a rotation between projection and product leaves nothing to reorder.
        linear_keys = isinstance(self.key_norm, nn.Identity) and parts.rotation is None
        self.class_token = None
        if first_row_only and linear_keys and self.scale == 1.0 and not fused:
            self.class_token = ClassTokenAttention(self.key, self.value, self.heads)
        self.set_precision(torch.float32, frozenset())

    def set_precision(self, dtype: torch.dtype, wide: frozenset[IslandPart]) -> None:
        """Give every part its type; a norm runs in the wider one of what it reads and of what reads it.

        Args:
            dtype: The type of the parts that are not ``wide``.
            wide: The parts that are float32.
        """
        attention, mlp, tokens = (torch.float32 if part in wide else dtype for part in PARTS)
        self.attention_type, self.mlp_type, self.token_type = attention, mlp, tokens
        # TensorRT-RTX has no float32 kernel for the fused operator.
        self.writes_fused = self.fused and "attention" not in wide
        self.norm_type = torch.promote_types(attention, tokens)
        self.mlp_norm_type = torch.promote_types(mlp, tokens)
        for module in (self.query, self.key, self.value, self.query_norm, self.key_norm, self.mixed_norm):
            module.to(attention)
        if self.class_token is not None:
            self.class_token.to(attention)
        self.projection.to(attention)
        self.attention_scale.to(attention)
        self.mlp.to(mlp)
        self.mlp_scale.to(mlp)
        self.norm.to(self.norm_type)
        self.mlp_norm.to(self.mlp_norm_type)
        if self.rotation is not None:
            self.rotation = self.rotation.to(attention)

    def forward(self, tokens: Tensor, columns: Columns) -> Tensor:
        """Run the block.

        Args:
            tokens: The block's input, [B, N, D].
            columns: What the tokens attend to besides themselves.

        Returns:
            The next block's tokens, [B, N, D], or [B, 1, D] if ``first_row_only``.
        """
        # Pre-attention norm of all tokens, [B, N, D]: keys and values come from every row.
        tokens = cast(tokens, self.token_type)
        normalised = cast(self.norm(cast(tokens, self.norm_type)), self.attention_type)

        # Rows that the block computes, M = N or 1, and their queries, [B, H, M, d].
        rows = tokens[:, :1] if self.first_row_only else tokens
        query_rows = normalised[:, :1] if self.first_row_only else normalised
        query = self.query_norm(self._heads(self.query(query_rows)))
        if not self.first_row_only:  # row 0 alone is the class token, which is at no place
            query = self._rotate(query)

        # Prefix: keys and values that stand ready, [1 or B, H, P, d] each.
        biases, prefix = [], None
        if columns.key is not None and columns.value is not None:
            prefix = cast(columns.key, self.attention_type), cast(columns.value, self.attention_type)
            biases.append((columns.bias, columns.key.shape[2]))

        # Adaptive prompts [B, T, D] are made of the image and normed like tokens; all rows to attend to: [B, T + N, D].
        attended, before = normalised, 0
        if columns.generator is not None:
            prompts = cast(self._generate(columns.generator, tokens, normalised), self.norm_type)
            prompts = cast(self.norm(prompts), self.attention_type)
            before = prompts.shape[1]
            biases.append((columns.generator.bias, before))
            # One product for both: the prompts alone would be a matrix of few rows, and their keys a copy more.
            attended = torch.cat([prompts, normalised], dim=1)

        # Bias of all columns in their order, prefix, prompts, tokens: [1 or B, P + T + N].
        bias = _join_biases(biases, tokens)

        # Attention, [B, H, M, d]: the class token's own form, or keys and values [B, H, P + T + N, d] for all rows.
        if self.class_token is not None:
            mixed = self.class_token(query, attended, prefix, bias)
        else:
            key = self._rotate(self.key_norm(self._heads(self.key(attended))), before)
            value = self._heads(self.value(attended))
            if prefix is not None:
                key = torch.cat([_repeat(prefix[0], tokens), key], dim=2)
                value = torch.cat([_repeat(prefix[1], tokens), value], dim=2)
            mixed = self._attend(query, key, value, bias)

        # Heads side by side, [B, M, D], output projection, first residual.
        mixed = self.mixed_norm(mixed.transpose(1, 2).flatten(2))
        rows = rows + cast(self.attention_scale(self.projection(mixed)), self.token_type)

        # MLP and second residual, [B, M, D].
        normalised = cast(self.mlp_norm(cast(rows, self.mlp_norm_type)), self.mlp_type)
        output: Tensor = rows + cast(self.mlp_scale(self.mlp(normalised)), self.token_type)
        return output

    def _generate(self, generator: GeneratorColumns, tokens: Tensor, normalised: Tensor) -> Tensor:
        """Return adaptive prompts, [B, T, D] (VAPT, arXiv 2501.18936, eq. 8-11)."""
        # Patches behind the LayerNorm that the generator reads, [B, n, D]; the block's own where it is the same.
        end = self.first_patch + self.patch_count
        if generator.eps is None:
            patches = normalised[:, self.first_patch : end]
        else:
            patches = F.layer_norm(tokens[:, self.first_patch : end], tokens.shape[-1:], eps=generator.eps)
        patches = cast(patches, self.attention_type)

        # G = γ ⊙ (A x̂) + const, [B, T, D].
        mix, scale, shift, down, up = (
            cast(part, self.attention_type)
            for part in (generator.mix, generator.scale, generator.shift, generator.down, generator.up)
        )
        made = self.generated(scale * (mix @ patches) + shift)

        # G + W2 relu(W1 G), by way of [B, T, r].
        hidden = self.generator_hidden(F.relu(made @ down.transpose(1, 2)))
        prompts: Tensor = self.generated(made + hidden @ up.transpose(1, 2))
        return prompts

    def _heads(self, projected: Tensor) -> Tensor:
        """Split [B, rows, D] into [B, H, rows, d]."""
        split: Tensor = projected.unflatten(-1, (self.heads, self.head_width))
        return split.transpose(1, 2)

    def _rotate(self, rows: Tensor, before: int = 0) -> Tensor:
        """Rotate the patches among rows [B, H, before + N, d]; prompts, class token and registers stay."""
        if self.rotation is None:
            return rows
        first = before + self.first_patch
        end = first + self.patch_count
        turned = apply_rot_embed_cat(rows[:, :, first:end], self.rotation, half=self.rotates_halves)
        return torch.cat([rows[:, :, :first], turned, rows[:, :, end:]], dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return softmax(q kᵀ + bias) v, [B, H, M, d]."""
        mask = None if bias is None else bias[:, None, None, :]

        # One operator, where the graph's opset has it.
        if self.writes_fused:
            if mask is not None:
                # ONNX Runtime's CPU kernel wants the mask's query axis at full length.
                mask = mask.to(query.dtype).expand(query.shape[0], 1, query.shape[2], key.shape[2])
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)

        # Its parts: logits [B, H, M, columns], float32 from there to the softmax.
        if self.scale != 1.0:
            query = query * self.scale
        logits = cast(self.logits(query @ key.transpose(-2, -1)), torch.float32)
        if mask is not None:
            logits = logits + mask
        return cast(logits.softmax(-1), value.dtype) @ value


def _join_biases(biases: list[tuple[Tensor | None, int]], tokens: Tensor) -> Tensor | None:
    """Return the bias of all columns, float32 [1 or B, P + T + N]; None where all are zero."""
    if all(bias is None for bias, _ in biases):
        return None
    batch = max(1 if bias is None else bias.shape[0] for bias, _ in biases)
    parts = [torch.zeros(batch, length) if bias is None else bias for bias, length in biases]
    return F.pad(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], (0, tokens.shape[1]))


def _repeat(constant: Tensor, tokens: Tensor) -> Tensor:
    """Repeat a constant [1, ...] for each image; what comes from the table [B, ...] has a row for each already."""
    return constant.expand(tokens.shape[0], -1, -1, -1) if constant.shape[0] == 1 else constant
