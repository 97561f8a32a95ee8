"""The frozen vision transformer inside a checkpoint, brought to timm's names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy_train.importing.checkpoint import Checkpoint
from vpdeploy_train.importing.names import EMBEDDINGS, ENCODER, KEY_VALUE_PROMPTS, LAYERS, MODEL, TRANSFORMER

_LAYER = re.compile(rf"{re.escape(LAYERS)}\.(\d{{1,4}})\.(.+)")
_VIT: Final = f"{TRANSFORMER}."
_NORMS: Final = {"attention_norm": "norm1", "ffn_norm": "norm2"}

NORM_EPS: Final = 1e-6
"""Of every LayerNorm of the public code's vision transformer."""


@dataclass(frozen=True, kw_only=True)
class StoredViT:
    """A vision transformer's tensors and the sizes that their shapes tell; the heads they do not tell.

    Attributes:
        width: Width of a token, D.
        depth: Number of blocks, L.
        hidden: Number of hidden units of a block's MLP.
        patch_size: Side of a patch, in pixels.
        grid: Patches along a side.
        tensors: The tensors by timm's names, float32.
    """

    width: int
    depth: int
    hidden: int
    patch_size: int
    grid: int
    tensors: Mapping[str, Tensor]

    @property
    def image_size(self) -> int:
        """Side of the input, in pixels."""
        return self.grid * self.patch_size

    def __str__(self) -> str:
        return (
            f"{self.depth} blocks of width {self.width}, MLP {self.hidden}, {self.patch_size}-pixel patches, "
            f"{self.image_size}-pixel images"
        )


def holds_vit(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a backbone, or parts of one; otherwise prompts and head are all there is.

    Raises:
        SpecError: It has one of another family; the message names a key of it.
    """
    foreign = next((key for key in checkpoint.keys if key.startswith(MODEL) and not key.startswith(_VIT)), None)
    if foreign is not None:
        raise SpecError(
            f"{checkpoint.source}: key '{foreign}' is no part of the public code's ViT, whose keys begin with "
            f"'{_VIT}'; its Swin, MAE and MoCo models are not supported: train anew with vpdeploy train"
        )
    own = (f"{EMBEDDINGS}.", f"{ENCODER}.")
    return any(key.startswith(own) and not key.endswith(KEY_VALUE_PROMPTS) for key in checkpoint.keys)


def read_vit(checkpoint: Checkpoint) -> StoredViT:
    """Take the backbone's tensors.

    Raises:
        SpecError: One is missing, or has an impossible shape; the message names it.
    """
    cls_token = checkpoint.take(f"{EMBEDDINGS}.cls_token", 1, 1, "D")
    width = cls_token.shape[2]
    positions = checkpoint.take(f"{EMBEDDINGS}.position_embeddings", 1, "1 + patches", width)
    patches = checkpoint.take(f"{EMBEDDINGS}.patch_embeddings.weight", width, 3, "patch", "patch")
    hidden = checkpoint.take(f"{LAYERS}.0.ffn.fc1.weight", "hidden", width).shape[0]
    tensors = {
        "cls_token": cls_token,
        "pos_embed": positions,
        "patch_embed.proj.weight": patches,
        "patch_embed.proj.bias": checkpoint.take(f"{EMBEDDINGS}.patch_embeddings.bias", width),
        "norm.weight": checkpoint.take(f"{ENCODER}.encoder_norm.weight", width),
        "norm.bias": checkpoint.take(f"{ENCODER}.encoder_norm.bias", width),
    }
    depth = _depth(checkpoint)
    for index in range(depth):
        tensors |= _read_block(checkpoint, index, width, hidden)
    return StoredViT(
        width=width,
        depth=depth,
        hidden=hidden,
        patch_size=patches.shape[2],
        grid=_grid(checkpoint, positions.shape[1] - 1),
        tensors=tensors,
    )


def _read_block(checkpoint: Checkpoint, index: int, width: int, hidden: int) -> dict[str, Tensor]:
    """Take one block's tensors; timm holds query, key and value in one."""
    theirs, ours = f"{LAYERS}.{index}", f"blocks.{index}"

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {
            "weight": checkpoint.take(f"{theirs}.{name}.weight", rows, columns),
            "bias": checkpoint.take(f"{theirs}.{name}.bias", rows),
        }

    parts = [linear(f"attn.{part}", width, width) for part in ("query", "key", "value")]
    block = {
        "attn.qkv": {kind: torch.cat([part[kind] for part in parts]) for kind in ("weight", "bias")},
        "attn.proj": linear("attn.out", width, width),
        "mlp.fc1": linear("ffn.fc1", hidden, width),
        "mlp.fc2": linear("ffn.fc2", width, hidden),
    }
    for their_norm, our_norm in _NORMS.items():
        block[our_norm] = {kind: checkpoint.take(f"{theirs}.{their_norm}.{kind}", width) for kind in ("weight", "bias")}
    return {f"{ours}.{name}.{kind}": value for name, pair in block.items() for kind, value in pair.items()}


def _depth(checkpoint: Checkpoint) -> int:
    """Return the number of blocks; a gap among them shows as a missing key."""
    found = [match for key in checkpoint.keys if (match := _LAYER.fullmatch(key))]
    return 1 + max(int(match[1]) for match in found if match[2] != KEY_VALUE_PROMPTS)


def _grid(checkpoint: Checkpoint, patches: int) -> int:
    grid = math.isqrt(patches)
    if grid < 1 or grid * grid != patches:
        raise SpecError(
            f"{checkpoint.source}: '{EMBEDDINGS}.position_embeddings' has positions of {patches} patches, which are "
            "no square grid; only square images are supported"
        )
    return grid
