"""Families of frozen backbones. A family is one file and one line in ``TRUNKS``."""

from __future__ import annotations

from typing import Final

from torch import nn

from vpdeploy.errors import SpecError
from vpdeploy_train.catalogue import unsupported_backbone
from vpdeploy_train.trunks.eva import EvaTrunk
from vpdeploy_train.trunks.plain import PlainTrunk
from vpdeploy_train.trunks.swin import SwinTrunk
from vpdeploy_train.trunks.trunk import Prefix, Trunk

__all__ = ["TRUNKS", "Prefix", "Trunk", "trunk_of"]

TRUNKS: Final[tuple[type[Trunk], ...]] = (PlainTrunk, EvaTrunk, SwinTrunk)
"""The families; a model belongs to the one whose ``model_type`` is its class."""


def trunk_of(model: nn.Module, name: str | None = None) -> Trunk:
    """Return the view of a timm model that prompts work with.

    Args:
        model: The timm model; it was created with ``num_classes=0``.
        name: The name that errors call it by; None is the name of its class.

    Raises:
        SpecError: No family takes it; the message names the part that prompts cannot enter.
    """
    kind = type(model)
    for family in TRUNKS:
        if kind is family.model_type:
            reason = family.refusal(model)
            if reason is None:
                return family(model)
            break
    else:
        reason = None
    raise SpecError(unsupported_backbone(name or kind.__name__, kind.__name__, reason))
