"""Weights of backbones from files: reading them, and what published checkpoints wrap around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from vpdeploy.errors import SpecError
from vpdeploy_train.tensorfile import SAFETENSORS, describe_file, is_safetensors, read_torch_file, unreadable
from vpdeploy_train.trunks import Trunk

_WRAPPERS = ("state_dict", "model", "teacher")
_ENCODERS = ("module.base_encoder.", "base_encoder.", "module.momentum_encoder.", "momentum_encoder.", "module.")
"""Where MoCo-v3's checkpoints, of pretraining and of linear probes, keep the backbone; the first that is there."""

_HEAD_KEYS = ("head.", "head_dist.", "fc_norm_head.")
_NAMED = 3
"""Tensors of each kind that one line of an error names."""

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
        raise SpecError(
            f"{path}: {'is a folder, expected a weights file' if path.is_dir() else 'weights file not found'}"
        )
    if path.suffix == ".npz":
        _load_npz(trunk.model, path)
        return
    state = _unwrap(read_state_dict(path), trunk, path)
    try:
        converted = trunk.timm_state(dict(state))
    except Exception:  # timm's filters expect keys of the architecture, and each stumbles over others in its own way
        converted = state
    try:
        adopt_state(trunk.model, converted, averages=averages)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path}: the weights do not fit the architecture: {reason}") from error


def adopt_state(model: nn.Module, state: dict[str, Tensor], *, averages: bool) -> None:
    """Load tensors under timm's names; classifier tensors are ignored.

    Args:
        model: A timm model that was created with ``num_classes=0``.
        state: The tensors, of the same architecture.
        averages: Whether the tensors' final norm and attention pooling give way to the model's own norm behind the
            mean, which stays fresh (gain 1, shift 0) unless the tensors bring one.

    Raises:
        RuntimeError: A tensor is missing, superfluous or of another shape; the first of each kind are named.
    """
    state = {key: value for key, value in state.items() if not key.startswith(_HEAD_KEYS)}
    if averages:
        own = model.state_dict()
        state = {key: value for key, value in state.items() if key in own or not key.startswith(_POOLING_KEYS)}
        state |= {key: own[key] for key in own if key.startswith("fc_norm.") and key not in state}
    if misfit := describe_misfit(model.state_dict(), state):
        raise RuntimeError(misfit)
    model.load_state_dict(state, strict=True)


def describe_misfit(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Return how tensors differ in name or shape from a model's, or None where they do not.

    Args:
        own: The model's tensors.
        found: A file's tensors.
    """
    shapes = {key: list(value.shape) for key, value in own.items()}
    others = {key: list(value.shape) for key, value in found.items()}
    differing = [key for key in shapes if key in others and others[key] != shapes[key]]
    parts = [
        _counted("of another shape", [f"{key} {others[key]}, not {shapes[key]}" for key in differing]),
        _counted("missing", [f"{key} {shape}" for key, shape in shapes.items() if key not in others]),
        _counted("too many", [f"{key} {shape}" for key, shape in others.items() if key not in shapes]),
    ]
    told = "; ".join(part for part in parts if part)
    return f"{told}{_guess(own, found)}" if told else None


def _counted(what: str, names: Sequence[str]) -> str:
    """Return a count and the first names; nothing where there are none."""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} tensors {what} ({', '.join(names[:_NAMED])}{more})" if names else ""


def _guess(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say, where the first projection and the blocks tell it, what kind of vision transformer the tensors are of."""
    if not any(key in own for key in found):
        return ": none of its names is the model's, it is another kind of model, or its names have a prefix"
    mine, theirs = _sizes(own), _sizes(found)
    if mine is None or theirs is None or mine == theirs:
        return ""
    return f": the file is of {theirs}, the backbone is of {mine}"


def _sizes(state: Mapping[str, Tensor]) -> str | None:
    """Return width, patch and depth in words; None where the tensors do not tell them."""
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        return None
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return f"width {projection.shape[0]}, patch {projection.shape[-1]}, {len(blocks)} blocks"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors from a safetensors file, or from a torch file without unpickling objects.

    Raises:
        SpecError: The file is neither, or holds something else.
    """
    try:
        named_so = path.suffix == SAFETENSORS
        content = safetensors.torch.load_file(path) if named_so or is_safetensors(path) else read_torch_file(path)
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
    try:
        with path.open("rb") as stream:  # NumPy leaves a damaged archive open if it opened it
            model.load_pretrained(stream)
    except KeyError as error:
        raise SpecError(
            f"{path}: the weights do not fit the architecture: no array {error.args[0]}; .npz holds a ViT in Google's "
            "layout"
        ) from error
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or "its arrays have other shapes"
        raise SpecError(f"{path}: the weights do not fit the architecture: {reason}") from error
    except Exception as error:  # zip, pickle and numpy each have their own; none of them is worth a traceback
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> SpecError:
    return SpecError(unreadable(path, describe_file(path, error)))
