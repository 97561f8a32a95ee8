"""A deployed backbone in three parts, and how each family of backbones gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

from torch import nn

from vpdeploy.errors import ExportError
from vpdeploy.graphfacts import ImageInput
from vpdeploy.preprocessing import Preprocessing
from vpdeploy_export.graph.eva import eva_parts
from vpdeploy_export.graph.plain import plain_parts
from vpdeploy_export.graph.swin import swin_parts
from vpdeploy_train.trunks import Trunk
from vpdeploy_train.trunks.eva import EvaTrunk
from vpdeploy_train.trunks.plain import PlainTrunk
from vpdeploy_train.trunks.swin import SwinTrunk


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
