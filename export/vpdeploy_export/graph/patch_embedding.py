"""The deployed graph's first step: pixels to tokens, with scaling and normalisation folded in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.preprocessing import Preprocessing


class PatchEmbedding(nn.Module):
    """Turns images into tokens: normalisation, patch projection, positions and class token, folded.

    A patch projection is a matrix product over non-overlapping patches. Pixels enter it as (u - 128) / 128, which is
    exact in float16; the rest of scaling and normalisation sits in its weight and constant.

    Args:
        model: The frozen backbone: timm's ``VisionTransformer``, ``Eva`` or ``SwinTransformer``.
        preprocessing: Tells mean and standard deviation.
        image_input: ``uint8`` takes pixels [B, H, W, 3]; ``float`` takes images [B, 3, H, W], already normalised.
    """

    weight: Tensor
    bias: Tensor | None
    position: Tensor | None
    leading: Tensor

    def __init__(self, model: Any, preprocessing: Preprocessing, image_input: ImageInput) -> None:
        super().__init__()
        projection: nn.Conv2d = model.patch_embed.proj
        self.patch = projection.kernel_size[0]
        self.grid = preprocessing.image_size // self.patch
        self.image_input = image_input

        # The projection, in float64, of pixels as they enter.
        weight = projection.weight.detach().double()
        bias = torch.zeros(weight.shape[0]).double() if projection.bias is None else projection.bias.detach().double()
        if image_input == "uint8":
            mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, 3, 1, 1)
            std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, 3, 1, 1)
            bias = bias + (weight * (128 / 255 - mean) / std).sum((1, 2, 3))
            weight = weight * (128 / 255) / std

        # Positions of the patches, and the rows before them: class token and registers.
        count, width = self.grid**2, weight.shape[0]
        positions = _positions(model, self.grid, width)
        leading = positions.shape[1] - count
        position: Tensor | None = positions[:, leading:]

        # Constants that nothing stands between are added up: bias and positions, unless a norm is between them.
        self.norm = None if isinstance(model.patch_embed.norm, nn.Identity) else copy.deepcopy(model.patch_embed.norm)
        if self.norm is None:
            position, bias = positions[:, leading:] + bias, torch.zeros(0)
        elif not positions[:, leading:].any():
            position = None
        self.register_buffer("weight", weight.permute(2, 3, 1, 0).reshape(-1, width).float())
        self.register_buffer("bias", None if self.norm is None else bias.float())
        self.register_buffer("position", None if position is None else position.float())
        self.register_buffer("leading", positions[:, :leading].float())

    def forward(self, image: Tensor) -> Tensor:
        """Return tokens, [B, N, D], from ``image`` in the form that ``image_input`` names."""
        grid, patch = self.grid, self.patch
        # Patches as rows, [B, n, patch · patch · 3].
        if self.image_input == "uint8":
            # The cast comes first: TensorRT takes uint8 as the type of an input that is cast, and of nothing else.
            pixels = (image.to(self.weight.dtype) - 128.0) * (1 / 128)
            patches = pixels.reshape(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 2, 4, 5)
            patches = patches.reshape(-1, grid * grid, patch * patch * 3)
        else:
            patches = image.to(self.weight.dtype).reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
            patches = patches.reshape(-1, grid * grid, patch * patch * 3)

        # Projection, norm where the backbone has one, positions: [B, n, D].
        tokens = patches @ self.weight
        if self.norm is not None and self.bias is not None:
            tokens = self.norm(tokens + self.bias)
        if self.position is not None:
            tokens = tokens + self.position

        # Class token and registers come before the patches.
        if self.leading.shape[1] == 0:
            return tokens
        return torch.cat([self.leading.expand(tokens.shape[0], -1, -1), tokens], dim=1)


def _positions(model: Any, grid: int, width: int) -> Tensor:
    """Return what the model adds to patches, behind the rows it puts before them, float64 [1, N, D]."""
    blank = torch.zeros(1, grid**2, width, dtype=next(model.parameters()).dtype)
    if not hasattr(model, "_pos_embed"):
        return blank.double()
    if model.dynamic_img_size:
        blank = blank.unflatten(1, (grid, grid))
    with torch.no_grad():
        made = model._pos_embed(blank)
    rows: Tensor = made[0] if isinstance(made, tuple) else made
    return rows.double()
