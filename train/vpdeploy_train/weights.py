"""Weights of backbones from files: reading them, and what published checkpoints wrap around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.trunks import Trunk

_WRAPPERS = ("state_dict", "model", "teacher")
_ENCODERS = ("module.base_encoder.", "base_encoder.", "module.momentum_encoder.", "momentum_encoder.", "module.")
"""Where MoCo-v3's checkpoints, of pretraining and of linear probes, keep the backbone; the first that is there."""

_HEAD_KEYS = ("head.", "head_dist.", "fc_norm_head.")
_POOLING_KEYS = ("norm.", "attn_pool.")
_MOCO_SMALL = "plain_vit_patch16_224_w384_d12_h12_m1536"


def load_weights(trunk: Trunk, path: Path, *, averages: bool = False) -> None:
    """Load a file's tensors into a backbone; classifier tensors are ignored.

    Args:
        trunk: The backbone.
        path: A state dict as safetensors or a torch file, under timm's or the publisher's names, or Google's ``.npz``.
        averages: Whether the backbone averages over patches before a fresh norm, whatever the weights were trained
            with.

    Raises:
        SpecError: The file cannot be read, or its tensors do not fit.
    """
    if not path.is_file():
        raise SpecError(f"{path}: weights file not found")
    try:
        if path.suffix == ".npz":
            _load_npz(trunk.model, path)
            return
        state = _unwrap(read_state_dict(path), trunk, path)
        adopt_state(trunk.model, trunk.timm_state(state), averages=averages)
    except SpecError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"{path}: the weights do not fit the architecture: {reason}") from error
    except Exception as error:  # zip, pickle and numpy each have their own; none of them is worth a traceback
        raise _unreadable(path, error) from error


def adopt_state(model: nn.Module, state: dict[str, Tensor], *, averages: bool) -> None:
    """Load tensors under timm's names; classifier tensors are ignored.

    Args:
        model: A timm model that was created with ``num_classes=0``.
        state: The tensors, of the same architecture.
        averages: Whether the tensors' final norm and attention pooling give way to the model's own norm behind the
            mean, which stays fresh (gain 1, shift 0) unless the tensors bring one.

    Raises:
        RuntimeError: A tensor is missing, superfluous or of another shape.
    """
    state = {key: value for key, value in state.items() if not key.startswith(_HEAD_KEYS)}
    if averages:
        own = model.state_dict()
        state = {key: value for key, value in state.items() if key in own or not key.startswith(_POOLING_KEYS)}
        state |= {key: own[key] for key in own if key.startswith("fc_norm.") and key not in state}
    model.load_state_dict(state, strict=True)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors from a safetensors file, or from a torch file without unpickling objects.

    Raises:
        SpecError: The file is neither, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise SpecError(f"{path}: not a readable safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, a pickle of objects and a short file raise three different kinds
        raise _unreadable(path, error) from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SpecError(f"{path}: expected a state dict of tensors")
    return content


def _unwrap(state: dict[str, Tensor], trunk: Trunk, path: Path) -> dict[str, Tensor]:
    """Return the backbone's tensors of a checkpoint of MoCo-v3 (two encoders) or MAE (encoder and decoder)."""
    for prefix in _ENCODERS:
        if f"{prefix}patch_embed.proj.weight" not in state:
            continue
        stage = trunk.stages[0]
        if prefix.endswith("_encoder.") and stage.width == 384 and stage.heads != 12:
            raise SpecError(
                f"{path}: MoCo-v3's ViT-S has 12 heads, the backbone has {stage.heads}; use --backbone {_MOCO_SMALL}"
            )
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "decoder_embed.weight" in state:
        return {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
    return state


def _load_npz(model: Any, path: Path) -> None:
    """Load Google's layout through timm."""
    if not hasattr(model, "load_pretrained") or isinstance(model.norm, nn.Identity):
        raise SpecError(
            f"{path}: .npz holds class-token ViTs in Google's layout; for another backbone or pooling give a state "
            "dict under timm's names"
        )
    with path.open("rb") as stream:  # NumPy leaves a damaged archive open if it opened it
        model.load_pretrained(stream)


def _unreadable(path: Path, error: Exception) -> SpecError:
    reason = " ".join(str(error).split())[:200]
    return SpecError(f"{path}: cannot be read as safetensors, .npz or a torch file of tensors alone ({reason})")
