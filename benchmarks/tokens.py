"""Prompts as tokens: the graph that is usually deployed, kept as the yardstick for benchmarks and reports."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx_ir as ir
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpdeploy.format.layout import BATCH_AXIS, IMAGE
from vpdeploy_export.onnx.trace import trace_module


class TokenPromptedViT(nn.Module):
    """A ViT that inserts prompts as tokens before every block and discards their outputs (VPT-deep, as published).

    Without prompts it is the plain model that other tools export.

    Args:
        vit: The frozen backbone; copied.
        prompts: For each block [T, D], or None for the plain model.
        head: The classifier; copied.
    """

    def __init__(self, vit: VisionTransformer, prompts: Sequence[Tensor] | None, head: nn.Linear) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit)
        self.head = copy.deepcopy(head)
        self.length = 0 if prompts is None else len(prompts[0])
        for index, block in enumerate(prompts or ()):
            self.register_buffer(f"prompt_{index}", block.detach()[None])
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, [B, C], from normalised images, [B, 3, H, W]."""
        if self.length == 0:
            plain: Tensor = self.head(self.vit(image))
            return plain
        tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(image)))
        first, rest = tokens[:, :1], tokens[:, 1:]
        for index, block in enumerate(self.vit.blocks):
            prompts = getattr(self, f"prompt_{index}").expand(image.shape[0], -1, -1)
            tokens = block(torch.cat([first, prompts, rest], dim=1))
            first, rest = tokens[:, :1], tokens[:, 1 + self.length :]
        tokens = self.vit.norm(torch.cat([first, rest], dim=1))
        logits: Tensor = self.head(self.vit.forward_head(tokens, pre_logits=True))
        return logits


def build_token_prompted(module: TokenPromptedViT, image_size: int, *, opset: int) -> ir.Model:
    """Return its ONNX model: input ``image`` float32 [B, 3, H, W], output ``logits``."""
    example = torch.zeros(2, 3, image_size, image_size)
    return trace_module(module, (example,), [IMAGE], ({0: torch.export.Dim(BATCH_AXIS)},), opset)
