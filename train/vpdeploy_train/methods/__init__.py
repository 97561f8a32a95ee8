"""Prompt methods by name. A method is one file and one line in ``METHODS``, or a package with an entry point."""

from __future__ import annotations

import json
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
    "require_storable",
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
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise BundleCorruptError(f"the structure of the prompts makes no sense: {error}") from error


def require_storable(name: str, method: PromptMethod, dimensions: PromptDimensions) -> None:
    """Check, before anything is trained, that a run of a method could be stored and read again.

    Args:
        name: The method's name.
        method: Fresh prompts.
        dimensions: Sizes taken from the backbone.

    Raises:
        SpecError: They could not; the message says what the method lacks.
    """
    import torch  # names of methods are known without it

    def refuse(reason: str) -> SpecError:
        return SpecError(
            f"method '{name}': {reason}, so a run of it could not be stored or read; update the package that brings it"
        )

    # What is stored besides tensors, and what is told of it.
    stored = {}
    for what, fields in (("structure", method.structure()), ("summary", method.summary())):
        try:
            stored[what] = json.loads(json.dumps(fields, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise refuse(f"its {what} is not JSON: {error}") from error
        if not isinstance(stored[what], dict):
            raise refuse(f"its {what} is no dictionary")
    parameters = stored["summary"].get("parameters")
    if not isinstance(parameters, int) or isinstance(parameters, bool):
        raise refuse("its summary does not count the 'parameters'")

    # What is read again has tensors of the same names and shapes; initial values are drawn for it in vain.
    try:
        with torch.random.fork_rng(devices=[]):
            again = restore_method(name, dimensions, stored["structure"])
    except BundleCorruptError as error:
        raise refuse(f"it cannot restore what it has just stored: {error}") from error
    shapes, found = ({key: value.shape for key, value in each.state_dict().items()} for each in (method, again))
    if shapes != found:
        differing = min(key for key in {*shapes, *found} if shapes.get(key) != found.get(key))
        raise refuse(f"what it restores differs in the tensor '{differing}'")
