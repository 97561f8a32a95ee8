"""The embedded backbone: a small pretrained ViT that is shipped in the wheel.

Importing this module registers ``vit_mini_patch8_64`` with timm, so that
``timm.create_model("vit_mini_patch8_64", pretrained=True, num_classes=0)`` works without a network.
How the weights were made, from which images, and how good they are: ``docs/embedded_backbone.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from vpdeploy_train.catalogue import EMBEDDED

NAME: Final = EMBEDDED
WEIGHTS: Final = Path(__file__).parent / "assets" / f"{NAME}.safetensors"

# timm looks this table up by its name, in the module of the entry point that is being registered.
default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 64, 64),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


def vit_mini_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the embedded backbone: ViT, width 160, depth 6, 5 heads, 8-pixel patches, 64-pixel images.

    Args:
        pretrained: load the weights of the package; they are stored as float16 and loaded as float32.
        **kwargs: passed on to timm's ``VisionTransformer``, e.g. ``num_classes`` (0 by default: no head).

    Returns:
        A model from images (B, 3, 64, 64), float32, scaled to -1..1, to features (B, 160), or to logits
        (B, C) when ``num_classes`` is given. The caller owns it.

    Raises:
        FileNotFoundError: ``pretrained`` was asked for and the weights file is not in the package.
    """
    if pretrained and not WEIGHTS.is_file():
        raise FileNotFoundError(
            f"expected the embedded weights at {WEIGHTS}, found no file: reinstall vpdeploy, "
            "or make them with tools/embedded_backbone"
        )
    architecture: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 160,
        "depth": 6,
        "num_heads": 5,
        "mlp_ratio": 4,
        "class_token": True,
        "global_pool": "token",
        "num_classes": 0,
    }
    # The filter resizes the position table when another img_size is asked for.
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**architecture, **kwargs},
    )
    return model


register_model(vit_mini_patch8_64)
