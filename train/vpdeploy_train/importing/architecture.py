"""Which architecture a stored backbone is: heads and name, neither of which its shapes tell."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import timm

from vpdeploy.errors import SpecError
from vpdeploy_train.architectures import plain_name
from vpdeploy_train.importing.vit import StoredViT

logger = logging.getLogger("vpdeploy.import")


@dataclass(frozen=True, kw_only=True)
class StandardViT:
    """A size that the literature names.

    Attributes:
        title: As papers write it.
        timm_size: As timm writes it.
        heads: Attention heads, H.
    """

    title: str
    timm_size: str
    heads: int


STANDARD: Final[dict[tuple[int, int, int], StandardViT]] = {
    (192, 12, 768): StandardViT(title="ViT-Ti", timm_size="tiny", heads=3),
    (384, 12, 1536): StandardViT(title="ViT-S", timm_size="small", heads=6),
    (768, 12, 3072): StandardViT(title="ViT-B", timm_size="base", heads=12),
    (1024, 24, 4096): StandardViT(title="ViT-L", timm_size="large", heads=16),
    (1280, 32, 5120): StandardViT(title="ViT-H", timm_size="huge", heads=16),
}
"""Width, depth and MLP hidden units to the standard vision transformer of these sizes."""


def name_architecture(source: str, vit: StoredViT, *, heads: int | None) -> str:
    """Return the name under which the backbone can be created again.

    Args:
        source: The checkpoint, for errors.
        vit: Its backbone.
        heads: Attention heads, if anything tells them; None takes a standard vision transformer's, and says so.

    Raises:
        SpecError: Nothing tells the heads, or the width cannot be divided by them.
    """
    standard = STANDARD.get((vit.width, vit.depth, vit.hidden))
    if heads is None:
        if standard is None:
            raise SpecError(
                f"{source}: the number of attention heads is not stored, and {vit} are no standard ViT's sizes; "
                "give --heads H, or --backbone with the timm name of the backbone"
            )
        heads = standard.heads
        logger.info(
            "note: the checkpoint does not store the number of attention heads; its sizes are those of %s, so %d are "
            "taken; --heads says otherwise",
            standard.title,
            heads,
        )
    if heads < 1 or vit.width % heads:
        raise SpecError(f"{source}: a width of {vit.width} cannot be divided into {heads} heads; correct --heads")
    if standard is not None and heads == standard.heads:
        for image_size in (vit.image_size, 224):
            name = f"vit_{standard.timm_size}_patch{vit.patch_size}_{image_size}"
            if timm.is_model(name):
                return name
    return plain_name(
        patch_size=vit.patch_size,
        image_size=vit.image_size,
        width=vit.width,
        depth=vit.depth,
        heads=heads,
        hidden=vit.hidden,
    )
