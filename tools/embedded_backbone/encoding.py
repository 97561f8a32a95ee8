"""From images to a vision transformer's tokens."""

from __future__ import annotations

from typing import Final

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tools.embedded_backbone.packages import Bytes

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


@torch.inference_mode()
def encode(model: VisionTransformer, images: Bytes, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return a ViT's normalised tokens (n, 1 + 64, D), float32, computed in bfloat16 where torch sees fit."""
    tokens = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(images), 64):
            batch = normalise(images[start : start + 64], mean, std)
            tokens.append(model.forward_features(batch).float())
    return torch.cat(tokens)


def normalise(images: Bytes, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn images (n, h, w, 3) uint8 into a batch (n, 3, h, w) float32."""
    scaled = torch.from_numpy(images).float().div_(255)
    return scaled.sub_(torch.tensor(mean)).div_(torch.tensor(std)).permute(0, 3, 1, 2).contiguous()
