"""Real timm architectures, cut in depth and image size, with random weights, and prompts run as tokens on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import timm
import tiny_runs
import torch
from torch import Tensor, nn

from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

SHORT: dict[str, Any] = {"img_size": 64, "depth": 2}
SHORT_14: dict[str, Any] = {"img_size": 56, "depth": 2}

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", SHORT),
    "patch 8": ("vit_small_patch8_224", {"img_size": 32, "depth": 1}),
    "patch 32": ("vit_small_patch32_224", SHORT),
    "DeiT": ("deit_tiny_patch16_224", SHORT),
    "DeiT-3": ("deit3_small_patch16_224", SHORT),
    "DINOv2": ("vit_small_patch14_dinov2", SHORT_14),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", SHORT_14),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 64, "depth": 1}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 1}),
    "averages, one register": ("vit_wee_patch16_reg1_gap_256", SHORT),
    "averages, no class token": ("vit_medium_patch16_gap_240", SHORT),
    "FlexiViT": ("flexivit_small", {"img_size": 64, "depth": 1}),
    "BEiT-3": ("beit3_base_patch16_224", {"img_size": 64, "depth": 1}),
    "AIMv2": ("aimv2_large_patch14_224", {"img_size": 56, "depth": 1}),
    "RMS norms": ("test_vit4", SHORT),
    "QK norm": ("vit_tiny_patch16_224", {**SHORT, "qk_norm": True}),
    "MAE's pooling": ("vit_tiny_patch16_224", {**SHORT, "global_pool": "avg"}),
}

ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "DINOv3": ("vit_small_patch16_dinov3", SHORT),
    "DINOv3 with SwiGLU": ("vit_small_plus_patch16_dinov3", {"img_size": 64, "depth": 1}),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb", {"img_size": 64, "depth": 1}),
    "EVA-02": ("eva02_tiny_patch14_224", SHORT_14),
    "EVA-02 with three projections": ("eva02_base_patch14_224", {"img_size": 56, "depth": 1}),
    "RoPE-ViT": ("vit_small_patch16_rope_224", {"img_size": 64, "depth": 1}),
    "RoPE-ViT with learned angles": ("vit_small_patch16_rope_mixed_ape_224", SHORT),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", SHORT),
    "LingBot": ("vit_small_patch16_lingbot", {"img_size": 64, "depth": 1}),
}

SWIN: dict[str, tuple[str, dict[str, Any]]] = {
    "Swin-T": ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (1, 2, 1, 1), "embed_dim": 48}),
    "Swin-T, windows padded": ("swin_tiny_patch4_window7_224", {"img_size": 100, "depths": (2, 2, 1, 1)}),
    "S3-T": ("swin_s3_tiny_224", {"img_size": 112, "depths": (1, 1, 2, 1)}),
}

ALL = {**PLAIN, **ROTARY, **SWIN}


def make(case: str) -> nn.Module:
    """Create a case's model, float32, every weight random."""
    name, options = ALL[case]
    return tiny_runs.randomise(timm.create_model(name, pretrained=False, num_classes=0, **options), 0)


def random_images(model: nn.Module, count: int = 2) -> Tensor:
    side = trunk_of(model).image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5)).to(next(model.parameters()))


def preprocessing_of(model: nn.Module) -> Preprocessing:
    return Preprocessing(
        image_size=trunk_of(model).image_size,
        resize="squash",
        crop_ratio=1.0,
        interpolation="bilinear",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
    )


def prompts_for(model: nn.Module, *, tokens: int = 3, kv_tokens: int = 2, seed: int = 1) -> E2VPT:
    """Prompts of unit scale; the first block has one less."""
    dimensions = PromptDimensions.of(trunk_of(model))
    whole = Kept.everything(dimensions.depth, tokens, kv_tokens)
    first = max(tokens - 1, 0)
    kept = Kept(
        tokens=(whole.tokens[0][:first], *whole.tokens[1:]),
        kv_tokens=whole.kv_tokens,
        segments=(whole.segments[0][:first], *whole.segments[1:]),
    )
    return tiny_runs.e2vpt(dimensions, kept, seed=seed)


def with_prompts(model: nn.Module, *, seed: int = 1, **lengths: int) -> PromptedViT:
    return tiny_runs.prompted(model, prompts_for(model, seed=seed, **lengths), 4, seed=seed)


def features_of_tokens(model: Any, pixels: Tensor, prompts: Sequence[Tensor], *, pools: bool = False) -> Tensor:
    """Run prompts [T, D] as rows through timm's own blocks: they enter each block behind class token and registers.

    ``pools``: the last block's prompt rows stay for the pooling.
    """
    if not hasattr(model, "blocks"):
        return _features_of_windows(model, pixels, prompts)
    embedded = model._pos_embed(model.patch_embed(pixels))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    tokens = model.norm_pre(tokens)
    first = model.num_prefix_tokens
    for index, (block, rows) in enumerate(zip(model.blocks, prompts, strict=True)):
        block = copy.deepcopy(block)
        joined = torch.cat([tokens[:, :first], rows.expand(len(pixels), -1, -1), tokens[:, first:]], dim=1)
        if rope is None:
            output = block(joined)
        else:
            block.attn.num_prefix_tokens += len(rows)
            output = block(joined, rope=rope[index] if model.rope_mixed else rope)
        tokens = torch.cat([output[:, :first], output[:, first + len(rows) :]], dim=1)
    return model.forward_head(model.norm(output if pools else tokens), pre_logits=True)


class _PromptedWindows(nn.Module):
    """Stands in for a Swin block's attention: the same rows before every window's own; they are queries too."""

    def __init__(self, attention: Any, rows: Tensor) -> None:
        super().__init__()
        self.attention, self.rows = attention, rows

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        attention, length = self.attention, len(self.rows)
        count, area, width = windows.shape
        joined = torch.cat([self.rows.expand(count, -1, -1), windows], dim=1)
        query, key, value = (
            part.reshape(count, length + area, attention.num_heads, -1).transpose(1, 2)
            for part in attention.qkv(joined).chunk(3, dim=-1)
        )
        logits = query @ key.transpose(-2, -1) * attention.scale
        logits[:, :, length:, length:] += attention._get_rel_pos_bias()
        if mask is not None:
            logits[:, :, length:, length:] += mask.repeat(count // len(mask), 1, 1)[:, None]
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).reshape(count, length + area, width)
        return attention.proj(mixed)[:, length:]


def _features_of_windows(model: Any, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    model = copy.deepcopy(model)
    blocks = [block for stage in model.layers for block in stage.blocks]
    for block, rows in zip(blocks, prompts, strict=True):
        block.attn = _PromptedWindows(block.attn, block.norm1(rows))
    return model(pixels)
