"""Frozen backbones: timm vision transformers that prompts can enter, and their identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vpdeploy_train.embedded  # noqa: F401  (registers the embedded architecture with timm)
from vpdeploy.errors import SpecError
from vpdeploy.format.task import BackboneId
from vpdeploy_train.architectures import create_plain, is_plain_name
from vpdeploy_train.catalogue import unknown_backbone
from vpdeploy_train.hub import cache_place, is_cached, why_unreachable
from vpdeploy_train.trunks import Trunk, trunk_of
from vpdeploy_train.weights import adopt_state, load_weights


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen vision transformer.

    Attributes:
        vit: The timm model, in eval mode, no parameter of which requires a gradient.
        trunk: The view of it that prompts work with.
        identity: Its architecture, dimensions and digest.
        image_size: Side of its input, in pixels.
        mean: Per-channel mean it was trained with.
        std: Per-channel standard deviation it was trained with.
        crop_ratio: Share of the scaled image its evaluation crop keeps.
    """

    vit: nn.Module
    trunk: Trunk
    identity: BackboneId
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_ratio: float


def load_backbone(
    name: str, *, weights: Path | None = None, image_size: int | None = None, averages: bool = False
) -> Backbone:
    """Return a frozen timm vision transformer with its weights.

    Args:
        name: Architecture as timm names it, with or without a tag, or as ``architectures.plain_name`` does.
        weights: A timm state dict as safetensors, Google's ``.npz``, or a torch file; None takes timm's pretrained
            weights from the package or the local hub cache, else downloads them.
        image_size: Side of the input, in pixels; None takes the architecture's own. Positions are interpolated.
        averages: Pool by the mean over patches and a fresh norm (MAE's recipe), not as the architecture does.

    Raises:
        SpecError: The name is unknown or not of the plain family, or the weights cannot be had or do not fit.

    Example:
        >>> backbone = vpdeploy_train.load_backbone("vit_mini_patch8_64")  # ships with vpdeploy
        >>> backbone.image_size, backbone.identity.patch_size
        (64, 8)
    """
    # Refuse names that nobody knows before anything is created.
    if is_plain_name(name):
        if weights is None:
            raise SpecError(f"backbone '{name}' has no pretrained weights: give a state dict with --weights FILE")
    elif not timm.is_model(name):
        raise SpecError(unknown_backbone(name, timm.list_models()))

    # Create the model, load its weights and freeze it.
    vit = _create(name, pretrained=weights is None, image_size=image_size, averages=averages)
    trunk = trunk_of(vit, name)
    if trunk.image_size % trunk.patch_size:
        raise SpecError(f"--image-size {trunk.image_size} should be a multiple of {trunk.patch_size}, {name}'s patch")
    if weights is not None:
        load_weights(trunk, weights, averages=averages)
    vit.eval()
    vit.requires_grad_(False)

    # What it is: the digest is over the tensors as they are used, after interpolation.
    config: Any = vit.pretrained_cfg
    stages = trunk.stages
    return Backbone(
        vit=vit,
        trunk=trunk,
        identity=BackboneId(
            name=name,
            sha256=digest_tensors(vit.state_dict()),
            depth=len(trunk.blocks),
            width=trunk.feature_width,
            heads=stages[-1].heads,
            patch_size=trunk.patch_size,
            hierarchy=stages if len(stages) > 1 else (),
        ),
        image_size=trunk.image_size,
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


def _create(name: str, *, pretrained: bool, image_size: int | None, averages: bool) -> nn.Module:
    """Create the timm model without its classifier, and check that prompts can enter it."""
    if is_plain_name(name):
        plain: nn.Module = create_plain(name, image_size=image_size, global_pool="avg" if averages else "token")
        return plain
    if pretrained:
        # On no device a model is made at once; drawing the initial values of a large one takes seconds.
        with torch.device("meta"):
            trunk_of(timm.create_model(name, pretrained=False, num_classes=0), name)
        _require_weights(name)
    sizes: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    pooling = {"global_pool": "avg"} if averages else {}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
        trunk_of(model, name)
        if averages:
            model = timm.create_model(name, pretrained=False, num_classes=0, **sizes, **pooling)
    except (TypeError, AssertionError, ValueError) as error:
        with torch.device("meta"):
            trunk_of(timm.create_model(name, pretrained=False, num_classes=0), name)
        wanted = "its own image size" if image_size is None else f"{image_size} px images"
        raise SpecError(f"backbone '{name}' cannot be created for {wanted}: {error}") from error
    if not pretrained:
        return model
    try:
        source: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, **sizes)
    except Exception as error:  # the hub client raises its own, httpx's, requests' and the system's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(
            f"the pretrained weights of '{name}' are not in the local hub cache and cannot be downloaded "
            f"({reason}); give a state dict with --weights FILE"
        ) from error
    if not averages:
        return source
    # timm would refuse the weights of another pooling, or load what fits of them without a word.
    adopt_state(model, source.state_dict(), averages=True)
    return model


def _require_weights(name: str) -> None:
    """Refuse a backbone whose pretrained weights are on the hub alone while the hub cannot be reached.

    Raises:
        SpecError: They cannot be had; the message says what was looked for, and where.
    """
    config = timm.get_pretrained_cfg(name)
    hub_id = None if config is None or config.file else config.hf_hub_id
    if not hub_id:
        return  # the package brings them, or timm says that there are none
    repository, _, revision = hub_id.partition("@")
    file = config.hf_hub_filename or "model.safetensors"
    files = (f"{Path(file).stem.replace('pytorch_model', 'model')}.safetensors", file)  # timm takes either
    if is_cached(repository, *files, revision=revision or None):
        return
    if reason := why_unreachable(repository, files[0]):
        raise SpecError(
            f"the pretrained weights of '{name}' are not in the local hub cache ({files[0]} of {repository} in "
            f"{cache_place()}), and {reason}; give a state dict with --weights FILE, or copy the cache of a machine "
            "that has them (HF_HOME says where it is)"
        )
