"""Families of frozen backbones. A family is one file and one line in ``TRUNKS``."""

from __future__ import annotations

from typing import Final

from torch import nn

from vpdeploy.errors import SpecError
from vpdeploy_train.trunks.eva import EvaTrunk
from vpdeploy_train.trunks.plain import PlainTrunk
from vpdeploy_train.trunks.swin import SwinTrunk
from vpdeploy_train.trunks.trunk import Prefix, Trunk

__all__ = ["TRUNKS", "Prefix", "Trunk", "trunk_of"]

TRUNKS: Final[tuple[type[Trunk], ...]] = (PlainTrunk, EvaTrunk, SwinTrunk)
"""The families; a model belongs to the one whose ``model_type`` is its class."""

_REFUSED: Final = {
    "VisionTransformerDistilled": "its feature is the mean of a class and a distillation token; use a deit_* without "
    "'distilled', or deit3_*",
    "SwinTransformerV2": "its attention compares angles and normalises after it, for which no prefix is written; "
    "use a swin_* of the first version",
    "Beit": "its position bias lies between all rows, for which no prefix is written; use beit3_* or eva02_*",
}


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
        families = ", ".join(family.model_type.__name__ for family in TRUNKS)
        reason = f"it is a {kind.__name__}, prompts enter timm's {families}"
        if kind.__name__ in _REFUSED:
            reason = f"it is a {kind.__name__}, {_REFUSED[kind.__name__]}"
    raise SpecError(
        f"backbone '{name or kind.__name__}' cannot take prompts: {reason}; "
        "docs/backbones.md lists what is supported, e.g. vit_base_patch16_224"
    )
