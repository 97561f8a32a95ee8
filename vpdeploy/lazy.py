"""Public names that a package imports when they are first asked for, so that importing the package loads little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package whose names lie in modules that are loaded late (PEP 562).

    Args:
        package: The package's name.
        modules: The module of each name, as it is called inside the package, e.g. ``{"Session": "session.session"}``.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return find
