"""The backbone of an imported run: the checkpoint's own, kept beside the run, or one that is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch

from vpdeploy.errors import SpecError
from vpdeploy.files import replacing_file
from vpdeploy_train.backbone import Backbone, digest_tensors, load_backbone
from vpdeploy_train.importing.architecture import name_architecture
from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.vit import NORM_EPS, StoredViT, read_vit
from vpdeploy_train.methods.method import PromptDimensions

WEIGHTS_FILE: Final = "backbone.safetensors"
"""Where an imported run keeps its backbone, in timm's names."""


@dataclass(frozen=True, kw_only=True)
class BackboneChoice:
    """What the caller says of the backbone.

    Attributes:
        name: The timm name of the backbone; None where it is not known.
        heads: Number of attention heads; None where it is not known.
        weights: The weights file of the named backbone, for checkpoints that hold no backbone.
        image_size: Side of the images in pixels, for checkpoints that hold no backbone.

    Example:
        >>> vpdeploy_train.BackboneChoice(heads=3)
        BackboneChoice(name=None, heads=3, weights=None, image_size=None)
    """

    name: str | None = None
    heads: int | None = None
    weights: Path | None = None
    image_size: int | None = None


def keep_backbone(
    checkpoint: Checkpoint, choice: BackboneChoice, folder: Path, *, stored_heads: int | None
) -> Backbone:
    """Write the checkpoint's backbone into a folder and load it from there.

    Args:
        checkpoint: A checkpoint that holds a backbone.
        choice: What the caller says of the backbone.
        folder: The folder that ``WEIGHTS_FILE`` is written to.
        stored_heads: The number of heads that the prompts tell; None where they do not.

    Raises:
        SpecError: It is incomplete, does not fit the choice, or is not the architecture that is named.
    """
    if choice.weights is not None or choice.image_size is not None:
        option = "--image-size" if choice.weights is None else "--weights"
        raise SpecError(f"{option}: {checkpoint.source} holds its own backbone; leave the option out")
    if stored_heads is not None and choice.heads not in (None, stored_heads):
        raise SpecError(f"--heads {choice.heads}: the key/value prompts of {checkpoint.source} have {stored_heads}")
    vit = read_vit(checkpoint)
    heads = choice.heads if stored_heads is None else stored_heads
    name = choice.name or name_architecture(checkpoint.source, vit, heads=heads)
    with replacing_file(folder / WEIGHTS_FILE) as temporary:
        safetensors.torch.save_file(dict(vit.tensors), temporary)
    backbone = _load_kept(checkpoint, name, vit, folder / WEIGHTS_FILE)
    if heads not in (None, backbone.identity.heads):
        raise SpecError(f"--backbone {name}: has {backbone.identity.heads} heads, {checkpoint.source} has {heads}")
    _require_reference_form(backbone, choice)
    return backbone


def named_backbone(checkpoint: Checkpoint, choice: BackboneChoice) -> Backbone:
    """Load the backbone that is named, for a checkpoint that holds prompts and head alone.

    Raises:
        SpecError: None is named, its weights cannot be had, or it is another kind of model than the public code's.
    """
    if choice.name is None:
        raise SpecError(
            f"{checkpoint.source}: holds no backbone; give --backbone with the timm name of the one it was trained on, "
            "and --weights if its weights are not timm's"
        )
    backbone = load_backbone(choice.name, weights=choice.weights, image_size=choice.image_size)
    if choice.heads not in (None, backbone.identity.heads):
        raise SpecError(f"--heads {choice.heads}: --backbone {choice.name} has {backbone.identity.heads}")
    _require_reference_form(backbone, choice)
    return backbone


def _load_kept(checkpoint: Checkpoint, name: str, vit: StoredViT, weights: Path) -> Backbone:
    """Load a backbone under a name, and make sure that no tensor was resampled to fit it."""
    refusal = SpecError(
        f"{checkpoint.source}: its backbone ({vit}) is no {name}; give the timm name of the one it was trained on, "
        "or --heads alone"
    )
    try:
        backbone = load_backbone(name, weights=weights, image_size=vit.image_size)
    except SpecError as error:
        if str(weights) not in str(error):
            raise
        raise refusal from error
    if backbone.identity.sha256 != digest_tensors(vit.tensors):
        raise refusal
    return backbone


def _require_reference_form(backbone: Backbone, choice: BackboneChoice) -> None:
    """Refuse a model that computes otherwise than the public code's ViT, though its tensors fit."""
    if not backbone.trunk.reads_class_token_only:
        raise SpecError(f"--backbone {choice.name}: does not pool by the class token, as the public code's ViT does")
    eps = PromptDimensions.of(backbone.trunk).norm_eps
    if eps != NORM_EPS:
        raise SpecError(f"--backbone {choice.name}: its LayerNorms have eps {eps}, the public code's {NORM_EPS}")
