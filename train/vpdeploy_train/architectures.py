"""Plain vision transformers that timm does not name: their name carries their dimensions.

``plain_vit_patch16_224_w768_d12_h12_m3072`` is ViT-B/16: 16-pixel patches, 224-pixel images, width 768, 12 blocks,
12 heads, 3072 hidden units in the MLP. Such a backbone has a class token, learned positions, biases everywhere and
LayerNorms of eps 1e-6, and no pretrained weights. Checkpoints of research code, of any size, become backbones by it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vpdeploy.errors import SpecError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

PREFIX: Final = "plain_vit_"
"""What such names start with."""

_NAME = re.compile("plain_vit_patch{0}_{0}_w{0}_d{0}_h{0}_m{0}".format("([0-9]{1,6})"))
_EXPECTED = "plain_vit_patch<P>_<IMAGE>_w<WIDTH>_d<DEPTH>_h<HEADS>_m<HIDDEN>"
_MOST_PARAMETERS = 8 * 10**9
"""Beyond the largest plain vision transformers that are published with weights; a name costs nothing to write."""


def plain_name(*, patch_size: int, image_size: int, width: int, depth: int, heads: int, hidden: int) -> str:
    """Return the name of a plain vision transformer of the given dimensions.

    Args:
        patch_size: Side of a patch, in pixels.
        image_size: Side of the input, in pixels; a multiple of ``patch_size``.
        width: Width of a token, D; a multiple of ``heads``.
        depth: Blocks, L.
        heads: Attention heads, H.
        hidden: Hidden units of a block's MLP.

    Raises:
        SpecError: The dimensions make no vision transformer.
    """
    name = f"{PREFIX}patch{patch_size}_{image_size}_w{width}_d{depth}_h{heads}_m{hidden}"
    _parse(name)
    return name


def is_plain_name(name: str) -> bool:
    """Whether a backbone's name claims to carry its dimensions; they may still be impossible."""
    return name.startswith(PREFIX)


def check_plain_name(name: str) -> None:
    """Check that the dimensions that a name carries make a vision transformer.

    Raises:
        SpecError: They do not, or the name cannot be read.
    """
    _parse(name)


def create_plain(name: str, *, image_size: int | None = None, global_pool: str = "token") -> VisionTransformer:
    """Create a plain vision transformer, without classifier and with random weights.

    Args:
        name: As ``plain_name`` makes it.
        image_size: Side of the input, in pixels; None takes the one that the name carries.
        global_pool: ``token`` or ``avg``, as timm calls it.

    Raises:
        SpecError: The name cannot be read, or its dimensions make no vision transformer.
    """
    # Imported here: the command line reads such names without torch.
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models.vision_transformer import VisionTransformer

    patch, own_size, width, depth, heads, hidden = _parse(name)
    size = own_size if image_size is None else image_size
    parameters = width * ((size // patch) ** 2 + 3 * patch**2 + depth * (4 * width + 2 * hidden))
    if parameters > _MOST_PARAMETERS:
        raise SpecError(
            f"backbone '{name}': {parameters / 1e9:.3g} billion parameters for {size} px images, "
            f"{_MOST_PARAMETERS / 1e9:.0f} at most are expected"
        )
    model = VisionTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=(hidden + 0.5) / width,  # timm multiplies and truncates
        num_classes=0,
        global_pool=global_pool,
    )
    model.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 0.875}
    return model


def _parse(name: str) -> tuple[int, int, int, int, int, int]:
    """Return patch size, image size, width, depth, heads and hidden units."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise SpecError(f"backbone '{name}' cannot be read: expected {_EXPECTED}")
    patch, image, width, depth, heads, hidden = map(int, found.groups())
    for number, divisor, what in (
        (image, patch, "the image size should be a multiple of the patch size"),
        (width, heads, "the width should be a multiple of the heads"),
    ):
        if min(number, divisor) < 1 or number % divisor:
            raise SpecError(f"backbone '{name}': {what}, found {number} and {divisor}")
    if min(depth, hidden) < 1:
        raise SpecError(f"backbone '{name}': depth and hidden units should be at least 1, found {depth} and {hidden}")
    return patch, image, width, depth, heads, hidden
