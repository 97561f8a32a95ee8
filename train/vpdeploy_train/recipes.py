"""The published training settings of VTAB-1k's 19 tasks and of the five fine-grained (FGVC) data sets, as a table.

Sources: VPT (arXiv 2203.12119) for what all share, E²VPT (arXiv 2307.13770) for the prompt lengths, VAPT (arXiv
2501.18936) for its own prompt length and, on FGVC, learning rates and weight decays. Where nothing was published the
settings' own defaults stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Final

from vpdeploy.errors import SpecError

_VAPT: Final = "vapt"
_VAPT_TOKENS: Final = {"prompt_tokens": 10, "vapt_hidden": 8}

_SHARED: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "backbone": "vit_base_patch16_224.orig_in21k",
        "image_size": 224,
        "normalisation": "imagenet",
        "optimizer": "sgd",
        "head": "zero",
        "epochs": 100,  # of which a tenth warms up, by default
    }
)
_VTAB: Final[Mapping[str, Any]] = MappingProxyType({**_SHARED, "resize": "squash", "augment": "none", "batch_size": 64})
_FGVC: Final[Mapping[str, Any]] = MappingProxyType(
    {**_SHARED, "resize": "crop", "crop_ratio": 224 / 256, "augment": "crop-flip", "batch_size": 128}
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the papers train on one data set.

    Attributes:
        classes: The data set's number of classes.
        shared: Settings it has in common with its benchmark.
        prompt_tokens: E²VPT's visual prompts in each block.
        kv_tokens: E²VPT's key/value prompts in each block.
        vapt_rates: Learning rate for batches of 256, and weight decay, as published for VAPT; None where they are not.
    """

    classes: int
    shared: Mapping[str, Any]
    prompt_tokens: int
    kv_tokens: int
    vapt_rates: tuple[float, float] | None = None

    def settings(self, method: str) -> dict[str, Any]:
        """Return the settings for a method, by their names in ``TrainSettings``."""
        layer = {**self.shared, "prompt_tokens": self.prompt_tokens, "kv_tokens": self.kv_tokens}
        if method == _VAPT:
            layer |= _VAPT_TOKENS
            if self.vapt_rates is not None:
                layer |= {"lr": self.vapt_rates[0], "weight_decay": self.vapt_rates[1]}
        return layer


def _vtab(classes: int, prompt_tokens: int = 10, kv_tokens: int = 5) -> Recipe:
    return Recipe(classes=classes, shared=_VTAB, prompt_tokens=prompt_tokens, kv_tokens=kv_tokens)


def _fgvc(classes: int, lr: float, weight_decay: float, prompt_tokens: int = 5) -> Recipe:
    return Recipe(
        classes=classes, shared=_FGVC, prompt_tokens=prompt_tokens, kv_tokens=5, vapt_rates=(lr, weight_decay)
    )


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "vtab/cifar100": _vtab(100, 5),
        "vtab/caltech101": _vtab(102, 32),
        "vtab/dtd": _vtab(47),
        "vtab/oxford_flowers102": _vtab(102, 1, 1),
        "vtab/oxford_iiit_pet": _vtab(37),
        "vtab/svhn": _vtab(10),
        "vtab/sun397": _vtab(397),
        "vtab/patch_camelyon": _vtab(2, 10, 10),
        "vtab/eurosat": _vtab(10),
        "vtab/resisc45": _vtab(45),
        "vtab/diabetic_retinopathy": _vtab(5),
        "vtab/clevr_count": _vtab(8),
        "vtab/clevr_dist": _vtab(6),
        "vtab/dmlab": _vtab(6),
        "vtab/kitti": _vtab(4),
        "vtab/dsprites_loc": _vtab(16, 5),
        "vtab/dsprites_ori": _vtab(16, 5),
        "vtab/smallnorb_azi": _vtab(18),
        "vtab/smallnorb_ele": _vtab(9),
        "fgvc/cub": _fgvc(200, 50.0, 1e-3),
        "fgvc/nabirds": _fgvc(555, 50.0, 1e-4),
        "fgvc/flowers": _fgvc(102, 50.0, 1e-3),
        "fgvc/dogs": _fgvc(120, 25.0, 1e-3),
        "fgvc/cars": _fgvc(196, 10.0, 1e-4),
    }
)
"""Every recipe: classes, and where they are not 10 and 5, E²VPT's prompt lengths."""


def recipe_named(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        SpecError: There is none of that name; the message lists close matches.
    """
    if name in RECIPES:
        return RECIPES[name]
    tasks = {known.partition("/")[2]: known for known in RECIPES}
    close = [tasks[task] for task in get_close_matches(name.rpartition("/")[2], tasks, n=3)]
    advice = f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(RECIPES)}"
    raise SpecError(f"--recipe '{name}': no such recipe; {advice}")


def recipe_remarks(name: str, *, classes: int, lr_is_given: bool) -> list[str]:
    """Return what someone who trains by a recipe should know, a line each.

    Args:
        name: The recipe.
        classes: The number of classes that the data has.
        lr_is_given: Whether a learning rate was published or asked for.

    Raises:
        SpecError: There is no such recipe.
    """
    remarks = []
    expected = recipe_named(name).classes
    if classes != expected:
        remarks.append(f"recipe {name} is for {expected} classes, the data has {classes}: is it the right data set?")
    if not lr_is_given:
        remarks.append(
            f"recipe {name}: no learning rate was published for this method, the default is a start; "
            "vpdeploy sweep finds a better one"
        )
    return remarks
