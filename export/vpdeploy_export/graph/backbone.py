"""A deployed backbone: how each family gives its three parts, and the graph of them up to the pooled feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from vpdeploy.errors import ExportError
from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.preprocessing import Preprocessing
from vpdeploy_export.graph.eva import eva_parts
from vpdeploy_export.graph.plain import plain_parts
from vpdeploy_export.graph.swin import swin_parts
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands, cast
from vpdeploy_train.trunks import Trunk
from vpdeploy_train.trunks.eva import EvaTrunk
from vpdeploy_train.trunks.plain import PlainTrunk
from vpdeploy_train.trunks.swin import SwinTrunk

FUSED_ATTENTION_OPSET = 23
"""From this opset on, attention is written as one ``Attention`` node."""


@dataclass(frozen=True, kw_only=True)
class GraphParts:
    """What a graph is made of.

    Attributes:
        embedding: Takes ``image`` and returns the first block's tokens.
        blocks: Each takes tokens and ``Columns``, and returns the next block's tokens.
        final: Takes the last block's tokens and returns the pooled feature, [B, D].
    """

    embedding: nn.Module
    blocks: list[nn.Module]
    final: nn.Module


class _MakeParts(Protocol):
    def __call__(
        self, trunk: Any, preprocessing: Preprocessing, *, image_input: ImageInput, fused: bool
    ) -> tuple[nn.Module, list[nn.Module], nn.Module]: ...


PARTS: Final[dict[type[Trunk], _MakeParts]] = {PlainTrunk: plain_parts, EvaTrunk: eva_parts, SwinTrunk: swin_parts}
"""One line for each family."""


def graph_parts(trunk: Trunk, preprocessing: Preprocessing, *, image_input: ImageInput, fused: bool) -> GraphParts:
    """Return copies of a backbone's parts with everything foldable folded.

    Args:
        trunk: The frozen backbone.
        preprocessing: Image size, mean and standard deviation.
        image_input: The form of the ``image`` input.
        fused: Whether attention is written as one operator; else it is written as its parts.

    Raises:
        ExportError: No graph is written for the backbone's family.
    """
    make = PARTS.get(type(trunk))
    if make is None:
        raise ExportError(f"no deployed graph is written for backbones of {type(trunk.model).__name__}")
    embedding, blocks, final = make(trunk, preprocessing, image_input=image_input, fused=fused)
    return GraphParts(embedding=embedding, blocks=blocks, final=final)


class BackboneGraph(nn.Module):
    """What both graphs share: the backbone up to the pooled feature. Softmax, head and logits are float32.

    Args:
        trunk: The frozen backbone; its parts are copied.
        preprocessing: Image size, mean and standard deviation.
        dtype: The type of weights and matrix products.
        image_input: The form of the ``image`` input.
        opset: The ONNX opset that will be written; from ``FUSED_ATTENTION_OPSET`` on, attention is one operator.
        islands: The parts that stay float32 in a narrower graph.
    """

    def __init__(
        self,
        trunk: Trunk,
        preprocessing: Preprocessing,
        *,
        dtype: torch.dtype,
        image_input: ImageInput,
        opset: int,
        islands: Islands = NO_ISLANDS,
    ) -> None:
        super().__init__()
        self.image_input = image_input
        parts = graph_parts(trunk, preprocessing, image_input=image_input, fused=opset >= FUSED_ATTENTION_OPSET)
        self.embedding = parts.embedding
        self.blocks = nn.ModuleList(parts.blocks)
        blocks: list[Any] = parts.blocks  # every family's have the method
        for index, block in enumerate(blocks):
            block.set_precision(dtype, islands.of(index))
        self.final = parts.final
        self.dtype = dtype
        self.islands = islands
        self.final_type = torch.float32 if islands.final else dtype
        self.embedding.to(torch.float32 if islands.embedding else dtype)
        self.final.to(self.final_type)
        self.requires_grad_(False).eval()

    def _pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled feature, float32 [B, D]."""
        return cast(self.final(cast(tokens, self.final_type)), torch.float32)

    def _classify(self, feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return logits, float32 [B, C].

        Args:
            feature: The pooled feature, float32 [B, D].
            weight: The head's weight, float32 [D, C] or [B, D, C].
            bias: The head's bias, float32 [C] or [B, C].
        """
        if self.dtype == torch.float32:
            return (feature @ weight if weight.dim() == 2 else (feature[:, None, :] @ weight)[:, 0]) + bias
        # TensorRT has no float32 matrix product for Turing; a product and a sum it compiles for every GPU.
        return (feature[:, :, None] * weight).sum(1) + bias
