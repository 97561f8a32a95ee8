"""Prompt methods by name. A method is one file and one line in ``METHODS``, or a package with an entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vpdeploy.errors import BundleCorruptError, SpecError
from vpdeploy_train.methods.options import MethodOptions
from vpdeploy_train.methods.registry import LoadedMethods, MethodRegistry

if TYPE_CHECKING:
    from vpdeploy_train.methods.method import PromptDimensions, PromptMethod

__all__ = [
    "METHODS",
    "METHOD_GROUP",
    "LoadedMethods",
    "MethodOptions",
    "MethodRegistry",
    "method_of_run",
    "restore_method",
]

METHOD_GROUP: Final = "vpdeploy.methods"
"""The entry-point group by which other packages bring methods."""

METHODS: Final = MethodRegistry(
    {
        "e2vpt": "vpdeploy_train.methods.e2vpt:E2VPT",
        "vapt": "vpdeploy_train.methods.vapt:VAPT",
        "vpt-deep": "vpdeploy_train.methods.e2vpt:VPTDeep",
        "vfpt": "vpdeploy_train.methods.vfpt:VFPT",
        "da-vpt": "vpdeploy_train.methods.davpt:DAVPT",
        "vpt-shallow": "vpdeploy_train.methods.shallow:VPTShallow",
        "linear": "vpdeploy_train.methods.method:NoPrompts",
        "lora": "vpdeploy_train.methods.lora:LoRA",
        "full": "vpdeploy_train.methods.full:FullFineTuning",
    },
    group=METHOD_GROUP,
)
"""Every method that is installed. Its names are known, and this module is imported, without torch."""


def method_of_run(name: str) -> type[PromptMethod]:
    """Return the method of a stored run.

    Raises:
        SpecError: It is not installed, or its package is broken.
    """
    if name not in METHODS:
        raise SpecError(
            f"method '{name}' is not installed: it is none of vpdeploy's own ({', '.join(METHODS)}), so install the "
            "package that brings it"
        )
    return METHODS[name]


def restore_method(name: str, dimensions: PromptDimensions, structure: dict[str, Any]) -> PromptMethod:
    """Return a method of the stored structure, its values still to be loaded.

    Raises:
        SpecError: The method is not installed, or its package is broken.
        BundleCorruptError: The structure makes no sense, or not on this backbone.
    """
    kind = method_of_run(name)
    try:
        return kind.restore(dimensions, structure)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleCorruptError(f"the structure of the prompts makes no sense: {error}") from error
