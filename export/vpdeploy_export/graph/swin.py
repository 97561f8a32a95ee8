"""Deployed parts of Swin transformers.

Tokens are rows [B, N, D] throughout. Shift, padding and partition into windows are one gather by constant positions,
and so is their inverse; position bias and shift mask are one constant. Where windows fill the map, the pre-attention
norm's affine is folded too: rows of padding are zero behind it, so that it cannot be where there are any.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_export.graph.columns import Columns
from vpdeploy_export.graph.norm_folding import linear, without_affine
from vpdeploy_export.graph.patch_embedding import PatchEmbedding
from vpdeploy_export.precision.islands import PARTS, IslandPart, cast
from vpdeploy_export.precision.probe import Place
from vpdeploy_train.trunks.swin import SwinTrunk, window_bias


def swin_parts(
    trunk: SwinTrunk, preprocessing: Preprocessing, *, image_input: ImageInput, fused: bool
) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """Return embedding, blocks and pooling of a Swin transformer.

    Attention is written as its parts also where ``fused`` is asked for: the operator has no axis for windows.
    """
    model = trunk.model
    side = preprocessing.image_size // trunk.patch_size
    embedding = PatchEmbedding(model, preprocessing, image_input)
    blocks: list[nn.Module] = []
    for index, block in enumerate(trunk.blocks):
        merging = trunk.merging(index)
        blocks.append(SwinGraphBlock(block, merging, side))
        side = side if merging is None else (side + 1) // 2
    return embedding, blocks, _SwinPooling(model, side)


class SwinGraphBlock(nn.Module):
    """A Swin block whose windows also attend to a prefix, and the patch merging before it where it opens a stage.

    Args:
        block: The frozen ``SwinTransformerBlock``; its parts are copied.
        merging: The patch merging that runs first, or None.
        side: The number of tokens along a side of the map that enters.
    """

    bias: Tensor
    windows: Tensor
    places: Tensor

    def __init__(self, block: Any, merging: nn.Module | None, side: int) -> None:
        super().__init__()
        # The map that enters, and the windows that it is parted into behind a patch merging.
        self.side = side
        self.merging = copy.deepcopy(merging)
        side = side if merging is None else (side + 1) // 2
        attention = block.attn
        self.heads = attention.num_heads
        windows, places = _window_positions(side, block.window_size, block.shift_size)
        self.pads = bool((windows == side**2).any())
        self.area = attention.window_area
        self.count = len(windows) // self.area

        # Projections, with the norm's affine and the logits' scale folded in.
        biases = [None] * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        projections = list(zip(attention.qkv.weight.chunk(3), biases, strict=True))
        norm = copy.deepcopy(block.norm1) if self.pads else None
        left, folded = without_affine(nn.Identity() if self.pads else block.norm1, projections)
        self.norm = left if norm is None else norm
        factors = (attention.scale, 1.0, 1.0)
        self.query, self.key, self.value = (
            linear(weight * factor, bias * factor) for (weight, bias), factor in zip(folded, factors, strict=True)
        )

        # The other parts as they are, and the constants: position bias with shift mask, and both gathers.
        self.projection = copy.deepcopy(attention.proj)
        self.mlp_norm, self.mlp = copy.deepcopy(block.norm2), copy.deepcopy(block.mlp)
        with torch.no_grad():
            self.register_buffer("bias", window_bias(block).transpose(0, 1)[None].float())
        self.register_buffer("windows", windows)
        self.register_buffer("places", places)
        self.logits, self.prefix_logits = Place(), Place()
        self.set_precision(torch.float32, frozenset())

    def set_precision(self, dtype: torch.dtype, wide: frozenset[IslandPart]) -> None:
        """Give every part its type; a norm runs in the wider one of what it reads and of what reads it.

        Args:
            dtype: The type of the parts that are not ``wide``.
            wide: The parts that are float32. What is added to the logits is always float32.
        """
        attention, mlp, tokens = (torch.float32 if part in wide else dtype for part in PARTS)
        self.attention_type, self.mlp_type, self.token_type = attention, mlp, tokens
        self.norm_type = torch.promote_types(attention, tokens)
        self.mlp_norm_type = torch.promote_types(mlp, tokens)
        for module in (self.query, self.key, self.value, self.projection):
            module.to(attention)
        self.mlp.to(mlp)
        self.norm.to(self.norm_type)
        self.mlp_norm.to(self.mlp_norm_type)
        if self.merging is not None:
            self.merging.to(tokens)

    def forward(self, tokens: Tensor, columns: Columns) -> Tensor:
        """Run patch merging and block.

        Args:
            tokens: The block's input, [B, N, D].
            columns: What the tokens of every window attend to besides themselves; there is no generator among it.

        Returns:
            The next block's tokens, [B, N, D], or [B, ⌈side/2⌉², 2D] behind a patch merging.
        """
        # Patch merging, where the block opens a stage: four tokens become one of twice the width.
        tokens = cast(tokens, self.token_type)
        if self.merging is not None:
            tokens = self.merging(tokens.unflatten(1, (self.side, self.side))).flatten(1, 2)

        # Norm, and one gather that shifts, pads and parts into W windows of A places: [B, W·A, D].
        rows = cast(self.norm(cast(tokens, self.norm_type)), self.attention_type)
        if self.pads:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        rows = rows.index_select(1, self.windows)

        # Queries, keys and values of all windows, [B, H, W·A, d]; logits within each, float32 [B, H, W, A, A].
        query, key, value = (self._heads(part(rows)) for part in (self.query, self.key, self.value))
        own_key, own_value = (self._windows(part) for part in (key, value))
        logits = cast(self.logits(self._windows(query) @ own_key.transpose(-2, -1)), torch.float32) + self.bias

        # Attention, [B, H, W·A, d].
        if columns.key is not None and columns.value is not None:
            # One softmax over both parts; the prefix is multiplied once for all windows, and copied for none.
            # Its logits are [B, H, W·A, P], the weights of both parts [B, H, W, A, P + A].
            prefix_key, prefix_value = (cast(part, self.attention_type) for part in (columns.key, columns.value))
            prefix = cast(self.prefix_logits(query @ prefix_key.transpose(-2, -1)), torch.float32)
            if columns.bias is not None:
                prefix = prefix + columns.bias[:, None, None, :]
            length = columns.key.shape[2]
            weights = cast(torch.cat([self._windows(prefix), logits], dim=-1).softmax(-1), value.dtype)
            mixed = (weights[..., length:] @ own_value).flatten(2, 3)
            mixed = mixed + weights[..., :length].flatten(2, 3) @ prefix_value
        else:
            mixed = (cast(logits.softmax(-1), value.dtype) @ own_value).flatten(2, 3)

        # Heads side by side, output projection, every token back to its place, first residual: [B, N, D].
        mixed = self.projection(mixed.transpose(1, 2).flatten(2)).index_select(1, self.places)
        tokens = tokens + cast(mixed, self.token_type)

        # MLP and second residual.
        normalised = cast(self.mlp_norm(cast(tokens, self.mlp_norm_type)), self.mlp_type)
        return tokens + cast(self.mlp(normalised), self.token_type)

    def _heads(self, projected: Tensor) -> Tensor:
        """Split [B, W·A, D] into heads, [B, H, W·A, d]."""
        split: Tensor = projected.unflatten(-1, (self.heads, -1))
        return split.transpose(1, 2)

    def _windows(self, rows: Tensor) -> Tensor:
        """Split [B, H, W·A, n] into windows, [B, H, W, A, n]."""
        split: Tensor = rows.unflatten(2, (self.count, self.area))
        return split


class _SwinPooling(nn.Module):
    """Runs the final norm and the pooling, by the backbone's own parts."""

    def __init__(self, model: Any, side: int) -> None:
        super().__init__()
        self.norm, self.head, self.side = copy.deepcopy(model.norm), copy.deepcopy(model.head), side

    def forward(self, tokens: Tensor) -> Tensor:
        feature: Tensor = self.head(self.norm(tokens).unflatten(1, (self.side, self.side)), pre_logits=True)
        return feature


def _window_positions(side: int, window: tuple[int, int], shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return which token stands at each place of the windows, [W·A], and at which place each token stands, [N].

    The token ``side²`` stands for padding.
    """
    # Which token stands where, after shift and padding.
    tokens = torch.arange(side**2).reshape(1, side, side, 1)
    shifted = torch.roll(tokens, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    padding = [-side % step for step in window]
    padded = nn.functional.pad(shifted, (0, 0, 0, padding[1], 0, padding[0]), value=side**2)

    # Read window by window, and the inverse of that.
    windows = window_partition(padded, window).flatten()
    places = torch.empty(side**2 + 1, dtype=torch.long)
    places[windows] = torch.arange(len(windows))
    return windows, places[:-1]
