"""Prompt methods by name. A method is one file and one line in ``METHODS``."""

from __future__ import annotations

from typing import Any, Final

from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy_train.methods.e2vpt import E2VPT, VPTDeep
from vpdeploy_train.methods.full import FullFineTuning
from vpdeploy_train.methods.lora import LoRA
from vpdeploy_train.methods.method import MethodOptions, NoPrompts, PromptDimensions, PromptMethod
from vpdeploy_train.methods.shallow import VPTShallow
from vpdeploy_train.methods.vapt import VAPT

__all__ = ["METHODS", "MethodOptions", "PromptDimensions", "PromptMethod", "method_named", "restore_method"]

METHODS: Final[dict[str, type[PromptMethod]]] = {
    "e2vpt": E2VPT,
    "vapt": VAPT,
    "vpt-deep": VPTDeep,
    "vpt-shallow": VPTShallow,
    "linear": NoPrompts,
    "lora": LoRA,
    "full": FullFineTuning,
}


def method_named(name: str) -> type[PromptMethod]:
    """Return a method by name.

    Raises:
        SpecError: There is none of that name.
    """
    if name not in METHODS:
        raise SpecError(f"unknown method '{name}'; choose one of: {', '.join(METHODS)}")
    return METHODS[name]


def restore_method(name: str, dimensions: PromptDimensions, structure: dict[str, Any]) -> PromptMethod:
    """Return a method of the stored structure, its values still to be loaded.

    Raises:
        SpecError: There is no method of that name.
        BundleCorruptError: The structure makes no sense, or not on this backbone.
    """
    try:
        return method_named(name).restore(dimensions, structure)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleCorruptError(f"the structure of the prompts makes no sense: {error}") from error
