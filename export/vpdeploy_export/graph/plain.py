"""Deployed parts of plain vision transformers.

Pixel scaling and normalisation are folded into the patch embedding, its bias and the positions into one addition, and
the class token and its position into one constant. With CLS pooling the last block computes the class token's row only.
"""

from __future__ import annotations

import copy

from timm.models.vision_transformer import Block
from torch import nn

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_export.graph.block import BlockParts, RowGraphBlock
from vpdeploy_export.graph.patch_embedding import PatchEmbedding
from vpdeploy_export.graph.pooling import Pooling
from vpdeploy_train.trunks.plain import PlainTrunk


def plain_parts(
    trunk: PlainTrunk, preprocessing: Preprocessing, *, image_input: ImageInput, fused: bool
) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """Return embedding, blocks and pooling of a plain ViT."""
    vit = trunk.model
    last = len(vit.blocks) - 1
    blocks: list[nn.Module] = [
        RowGraphBlock(
            _block_parts(block, (vit.num_prefix_tokens, trunk.grid**2)),
            first_row_only=trunk.reads_class_token_only and index == last,
            fused=fused,
        )
        for index, block in enumerate(vit.blocks)
    ]
    embedding = nn.Sequential(PatchEmbedding(vit, preprocessing, image_input), copy.deepcopy(vit.norm_pre))
    return embedding, blocks, Pooling(vit)


def _block_parts(block: Block, patches: tuple[int, int]) -> BlockParts:
    block = copy.deepcopy(block)
    attention = block.attn
    biases = [None] * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    return BlockParts(
        norm=block.norm1,
        projections=list(zip(attention.qkv.weight.chunk(3), biases, strict=True)),
        query_norm=attention.q_norm,
        key_norm=attention.k_norm,
        mixed_norm=attention.norm,
        projection=attention.proj,
        attention_scale=block.ls1,
        mlp_norm=block.norm2,
        mlp=block.mlp,
        mlp_scale=block.ls2,
        heads=attention.num_heads,
        patches=patches,
    )
