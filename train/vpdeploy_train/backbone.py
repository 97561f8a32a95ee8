"""Frozen backbones: timm vision transformers of the plain family, and their identity."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor

import vpdeploy_train.embedded  # noqa: F401  (registers the embedded architecture with timm)
from vpdeploy.errors import SpecError
from vpdeploy.task import BackboneId

EMBEDDED = "vit_mini_patch8_64"
"""The backbone that ships with vpdeploy and needs no download."""

_HEAD_KEYS = ("head.", "head_dist.", "fc_norm_head.")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen vision transformer.

    Attributes:
        vit: The timm model, in eval mode, no parameter of which requires a gradient.
        identity: Its architecture, dimensions and digest.
        image_size: Side of its input, in pixels.
        mean: Per-channel mean it was trained with.
        std: Per-channel standard deviation it was trained with.
        crop_ratio: Share of the scaled image its evaluation crop keeps.
    """

    vit: VisionTransformer
    identity: BackboneId
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_ratio: float


def load_backbone(name: str, *, weights: Path | None = None, image_size: int | None = None) -> Backbone:
    """Create a timm vision transformer and load its weights.

    Args:
        name: Architecture as timm names it, with or without a tag.
        weights: A timm state dict as safetensors, Google's ``.npz``, or a torch file; None takes timm's pretrained
            weights from the package or the local hub cache, else downloads them.
        image_size: Side of the input, in pixels; None takes the architecture's own. Positions are interpolated.

    Raises:
        SpecError: The name is unknown or not of the plain family, or the weights cannot be had or do not fit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models('vit_*')"
        raise SpecError(f"unknown backbone '{name}'{hint}")
    vit = _create(name, pretrained=weights is None, image_size=image_size)
    patch_size = vit.patch_embed.patch_size[0]
    if vit.patch_embed.img_size[0] % patch_size:
        raise SpecError(
            f"--image-size {vit.patch_embed.img_size[0]} should be a multiple of {patch_size}, {name}'s patch"
        )
    if weights is not None:
        _load_weights(vit, weights)
    vit.eval()
    vit.requires_grad_(False)
    config = vit.pretrained_cfg
    block: Block = vit.blocks[0]
    return Backbone(
        vit=vit,
        identity=BackboneId(
            name=name,
            sha256=digest_tensors(vit.state_dict()),
            depth=len(vit.blocks),
            width=vit.embed_dim,
            heads=block.attn.num_heads,
            patch_size=patch_size,
        ),
        image_size=vit.patch_embed.img_size[0],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_ratio=float(config.get("crop_pct") or 0.9),
    )


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal sha256 over names, shapes and float32 values, independent of the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _create(name: str, *, pretrained: bool, image_size: int | None) -> VisionTransformer:
    """Create the timm model without its classifier, and check that it is of the plain family."""
    sizes: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    except (TypeError, AssertionError, ValueError) as error:
        raise SpecError(f"backbone '{name}' cannot be created for {image_size} px images: {error}") from error
    check_plain(name, model)
    if not pretrained:
        return model
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **sizes)
    except Exception as error:  # the hub client raises its own, httpx's, requests' and the system's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(
            f"the pretrained weights of '{name}' are not in the local hub cache and cannot be downloaded "
            f"({reason}); give a state dict with --weights FILE"
        ) from error


def check_plain(name: str, model: Any) -> None:
    """Refuse what prompts cannot enter as keys and values of a standard block.

    Raises:
        SpecError: The model is not a plain timm ``VisionTransformer``; the message names the part.
    """
    reason = None
    if type(model) is not VisionTransformer:
        reason = f"it is a {type(model).__name__}"
    elif odd := [block for block in model.blocks if type(block) is not Block]:
        reason = f"its blocks are {type(odd[0]).__name__}"
    elif odd := [block.attn for block in model.blocks if type(block.attn) is not Attention]:
        reason = f"its attention is {type(odd[0]).__name__}"
    elif any(getattr(block.attn, "gate", None) is not None for block in model.blocks):
        reason = "its attention is gated"
    if reason:
        raise SpecError(f"backbone '{name}' is not a plain vision transformer: {reason}; expected e.g. {EMBEDDED}")


def _load_weights(vit: VisionTransformer, path: Path) -> None:
    """Load a state dict from a file; classifier tensors are ignored."""
    if not path.is_file():
        raise SpecError(f"{path}: weights file not found")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as stream:  # NumPy leaves a damaged archive open if it opened it
                vit.load_pretrained(stream)
            return
        state = checkpoint_filter_fn(_read_state_dict(path), vit)
        state = {key: value for key, value in state.items() if not key.startswith(_HEAD_KEYS)}
        vit.load_state_dict(state, strict=True)
    except SpecError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"{path}: the weights do not fit the architecture: {reason}") from error
    except Exception as error:  # zip, pickle and numpy each have their own; none of them is worth a traceback
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> SpecError:
    reason = " ".join(str(error).split())[:200]
    return SpecError(f"{path}: cannot be read as safetensors, .npz or a torch file of tensors alone ({reason})")


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors from a safetensors file, or from a torch file without unpickling objects."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise SpecError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, a pickle of objects and a short file raise three different kinds
        raise _unreadable(path, error) from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SpecError(f"{path}: expected a state dict of tensors")
    return content
