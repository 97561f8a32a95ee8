"""Small things that several tests need: a tiny backbone, random prompts, coloured images, and a reference forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vpdeploy_export.compilation import CompiledBlock
from vpdeploy_train.methods.e2vpt import E2VPT
from vpdeploy_train.methods.kept import SEGMENTS, Kept
from vpdeploy_train.methods.method import PromptDimensions
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import Prefix, trunk_of

WIDTH, DEPTH, HEADS, PATCH, SIDE, CLASSES = 32, 3, 2, 4, 16, 3

TOY = "toy_vit_patch4_16"
"""A backbone that timm creates by name: width 32, depth 2, 2 heads, 4-pixel patches, 16-pixel images."""

default_cfgs = generate_default_cfgs(
    {
        TOY: {
            "num_classes": 0,
            "input_size": (3, SIDE, SIDE),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


def toy_vit_patch4_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    architecture = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
    architecture |= {"mlp_ratio": 2, "num_classes": 0}
    return build_model_with_cfg(
        VisionTransformer, TOY, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**architecture, **kwargs}
    )


if not timm.is_model(TOY):
    register_model(toy_vit_patch4_16)


def write_weights(path: Path, name: str = TOY, **options: Any) -> Path:
    """Write random weights of a named backbone, none of them at an initial value such as 0 or 1."""
    torch.manual_seed(0)
    vit = randomise(timm.create_model(name, pretrained=False, num_classes=0, **options))
    safetensors.torch.save_file(vit.state_dict(), path)
    return path


def write_colours(root: Path) -> Path:
    """Write 14 noisy 16×16 images for each of three colours, as a folder of class folders."""
    noise = np.random.default_rng(7)
    for name, colour in {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (200, 50, 60)}.items():
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(14):
            pixels = np.array(colour) + noise.integers(-40, 40, (SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return root


def randomise(vit: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """Move every parameter off its initial value: a zero bias or a unit scale would hide mistakes."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=source)
    return vit.eval().requires_grad_(False)


def make_vit(**options: Any) -> VisionTransformer:
    """Return a small vision transformer with random float32 weights, frozen."""
    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    torch.manual_seed(0)
    return randomise(VisionTransformer(**{**sizes, "mlp_ratio": 2.0, "num_classes": 0, **options}))


def dimensions_of(vit: VisionTransformer) -> PromptDimensions:
    return PromptDimensions.of(trunk_of(vit))


def make_method(vit: VisionTransformer, tokens: int, kv_tokens: int, **options: Any) -> E2VPT:
    """Return prompts of normal random values, and with ``segments`` given, those flags for every token."""
    dimensions = dimensions_of(vit)
    segments = options.pop("segments", None)
    kept = Kept.everything(dimensions.depth, tokens, kv_tokens)
    if segments is not None:
        kept = Kept(tokens=kept.tokens, kv_tokens=kept.kv_tokens, segments=segments)
    method = E2VPT(dimensions, kept, **options)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source))
    return method


def make_model(vit: VisionTransformer, method: nn.Module, classes: int = CLASSES) -> PromptedViT:
    """Return a float64 model in eval mode."""
    model = PromptedViT(vit, method, classes)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return model.double().eval()


def random_segments(tokens: int, depth: int = DEPTH) -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """Return flags, of which about a third are False, other ones for every block and token."""
    flags = np.random.default_rng(3).random((depth, tokens, SEGMENTS)) < 0.65
    return tuple(tuple(tuple(bool(flag) for flag in row) for row in block) for block in flags)


def segment_factors(segments: Sequence[Sequence[bool]], width: int, order: str) -> Tensor:
    """Return segment flags as factors of channels, [T, D], written down channel by channel."""
    of_channel = [c // (width // SEGMENTS) if order == "contiguous" else c % SEGMENTS for c in range(width)]
    return torch.tensor([[float(row[of_channel[c]]) for c in range(width)] for row in segments], dtype=torch.float64)


def random_pixels(count: int, side: int = SIDE, seed: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention_with_extra_keys(attention: nn.Module, x: Tensor, extra_key: Tensor, extra_value: Tensor) -> Tensor:
    """Attend as E²VPT writes it: [A_k ; K] and [A_v ; V] after the projections, and a plain softmax."""
    batch, rows, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    query, key, value = (part.reshape(batch, rows, heads, width).transpose(1, 2) for part in (query, key, value))
    query, key = attention.q_norm(query), attention.k_norm(key)
    key = torch.cat([extra_key[None].repeat(batch, 1, 1, 1), key], dim=2)
    value = torch.cat([extra_value[None].repeat(batch, 1, 1, 1), value], dim=2)
    logits = query @ key.transpose(2, 3) / width**0.5
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    mixed = (weights @ value).transpose(1, 2).reshape(batch, rows, heads * width)
    return attention.proj(attention.norm(mixed))


def block_with_extra_keys(block: Block, x: Tensor, extra_key: Tensor, extra_value: Tensor) -> Tensor:
    x = x + block.ls1(attention_with_extra_keys(block.attn, block.norm1(x), extra_key, extra_value))
    return x + block.ls2(block.mlp(block.norm2(x)))


def features_with_tokens(
    vit: VisionTransformer,
    pixels: Tensor,
    visual: Sequence[Tensor],
    kv: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Compute features with prompts as tokens: inserted after the class token before every block, dropped after it.

    Args:
        vit: The backbone.
        pixels: [B, 3, H, W].
        visual: For each block, [T, D].
        kv: For each block, key and value prompts [H, T_KV, d]; None runs timm's own blocks.
    """
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    for index, block in enumerate(vit.blocks):
        count = visual[index].shape[0]
        rows = visual[index][None].repeat(pixels.shape[0], 1, 1)
        joined = torch.cat([tokens[:, :1], rows, tokens[:, 1:]], dim=1)
        joined = block(joined) if kv is None else block_with_extra_keys(block, joined, *kv[index])
        tokens = torch.cat([joined[:, :1], joined[:, 1 + count :]], dim=1)
    return vit.forward_head(vit.norm(tokens), pre_logits=True)


def unmerged_prefixes(model: PromptedViT) -> list[CompiledBlock]:
    """Return what a float64 model with prompts in every block trains with: a column for each prompt, equal or not."""
    unused = torch.zeros(1, 1, model.trunk.feature_width, dtype=torch.float64)
    prefixes = [model.prefix(index, unused) for index in range(len(model.trunk.blocks))]
    return [
        CompiledBlock(
            key=prefix.key.numpy(), value=prefix.value.numpy(), bias=np.zeros(prefix.key.shape[1], dtype=np.float64)
        )
        for prefix in prefixes
    ]


def features_with_prefixes(vit: VisionTransformer, pixels: Tensor, prefixes: Sequence[CompiledBlock]) -> Tensor:
    """Compute features from a compiled prefix."""
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    trunk = trunk_of(vit)
    for index, prefix in enumerate(prefixes):
        parts = {name: torch.from_numpy(getattr(prefix, name).copy()) for name in ("key", "value", "bias")}
        tokens = trunk.run(index, tokens, Prefix(**parts))
    return vit.forward_head(vit.norm(tokens), pre_logits=True)
