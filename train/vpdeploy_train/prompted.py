"""The prompted vision transformer: a frozen backbone, one prompt method and a linear head."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpdeploy_train.attention import run_block
from vpdeploy_train.methods.method import PromptMethod


class PromptedViT(nn.Module):
    """A frozen timm ViT whose blocks attend to the prefixes of a prompt method.

    With CLS pooling the last block computes the class token's row only, which is exact and saves most of the block.
    With ``method`` holding no prompts, the features equal timm's own forward.

    Args:
        vit: The frozen backbone, created with ``num_classes=0``; it stays in eval mode.
        method: The prompts; trained.
        classes: Number of classes, C.
    """

    def __init__(self, vit: VisionTransformer, method: PromptMethod, classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.method = method
        self.head = nn.Linear(vit.num_features, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.train(self.training)

    def train(self, mode: bool = True) -> PromptedViT:
        """Switch prompts and head between training and evaluation; the backbone stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def features(self, pixels: Tensor) -> Tensor:
        """Compute the pooled feature.

        Args:
            pixels: Normalised images, [B, 3, H, W].

        Returns:
            [B, D].
        """
        tokens = embed_pixels(self.vit, pixels)
        last = len(self.vit.blocks) - 1
        for index, block in enumerate(self.vit.blocks):
            prefix = self.method.prefix(index, block, tokens)
            first_row_only = index == last and reads_class_token_only(self.vit)
            tokens = run_block(block, tokens, prefix, first_row_only=first_row_only)
        features: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return features

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits, [B, C], from normalised images, [B, 3, H, W]."""
        logits: Tensor = self.head(self.features(pixels))
        return logits

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trained tensors by name, prompts first, detached copies on the CPU."""
        state = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        state |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Set the trained tensors from ``trained_state``'s form.

        Raises:
            RuntimeError: A tensor is missing or of another shape.
        """
        for prefix, module in (("method.", self.method), ("head.", self.head)):
            part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            module.load_state_dict(part, strict=True)


def embed_pixels(vit: VisionTransformer, pixels: Tensor) -> Tensor:
    """Turn normalised images [B, 3, H, W] into the first block's tokens [B, N, D], as timm does."""
    tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
    return tokens


def reads_class_token_only(vit: VisionTransformer) -> bool:
    """Tell whether the model's feature is the class token's row alone."""
    return vit.global_pool == "token" and vit.attn_pool is None and vit.cls_token is not None


def normalise_pixels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 images [B, H, W, 3] into normalised float32 images [B, 3, H, W].

    Args:
        pixels: uint8 [B, H, W, 3].
        mean: Per-channel mean of pixels in [0, 1], [3].
        std: Per-channel standard deviation, [3].
    """
    scaled = (pixels.to(torch.float32) / 255.0 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()
