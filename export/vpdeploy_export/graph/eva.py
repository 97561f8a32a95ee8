"""Deployed parts of vision transformers with rotary positions.

The same is folded as for plain ones, and the sines and cosines of the rotary positions are constants. Prefix and
generated prompts are not rotated, as in training.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_export.graph.block import BlockParts, RowGraphBlock
from vpdeploy_export.graph.patch_embedding import PatchEmbedding
from vpdeploy_export.graph.pooling import Pooling
from vpdeploy_train.trunks.eva import EvaTrunk, projections


def eva_parts(
    trunk: EvaTrunk, preprocessing: Preprocessing, *, image_input: ImageInput, fused: bool
) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """Return embedding, blocks and pooling of an ``Eva``."""
    model = trunk.model
    last = len(model.blocks) - 1
    blocks: list[nn.Module] = [
        RowGraphBlock(
            _block_parts(trunk, index),
            first_row_only=trunk.reads_class_token_only and index == last,
            fused=fused,
        )
        for index in range(len(model.blocks))
    ]
    embedding = nn.Sequential(PatchEmbedding(model, preprocessing, image_input), copy.deepcopy(model.norm_pre))
    return embedding, blocks, Pooling(model)


def _block_parts(trunk: EvaTrunk, index: int) -> BlockParts:
    model = trunk.model
    block: Any = copy.deepcopy(model.blocks[index])
    attention = block.attn
    with torch.no_grad():
        rotation = trunk.rotation(index)
    return BlockParts(
        norm=block.norm1,
        projections=projections(attention),
        query_norm=attention.q_norm,
        key_norm=attention.k_norm,
        mixed_norm=attention.norm,
        projection=attention.proj,
        attention_scale=_layer_scale(block.gamma_1),
        mlp_norm=block.norm2,
        mlp=block.mlp,
        mlp_scale=_layer_scale(block.gamma_2),
        heads=attention.num_heads,
        rotation=None if rotation is None else rotation.detach().clone(),
        rotates_halves=attention.rotate_half,
        patches=(model.num_prefix_tokens, trunk.grid**2),
    )


def _layer_scale(gamma: Tensor | None) -> nn.Module:
    """Return the module that multiplies by gamma, [D]."""
    if gamma is None:
        return nn.Identity()
    scale: nn.Module = LayerScale(len(gamma))
    scale.gamma = nn.Parameter(gamma.detach().clone(), requires_grad=False)
    return scale
