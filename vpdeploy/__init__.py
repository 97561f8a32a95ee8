"""vpdeploy: prompt-tuned vision transformers in production.

``load`` opens what ``vpdeploy export`` wrote; training and exporting live in ``vpdeploy_train`` and
``vpdeploy_export``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpdeploy.loading import load as load
    from vpdeploy.session import Session as Session

__all__ = ["Session", "__version__", "load"]

__version__ = "0.1.0"

_LAZY = {"load": ("vpdeploy.loading", "load"), "Session": ("vpdeploy.session", "Session")}


def __getattr__(name: str) -> Any:
    """Import the session when it is first asked for: ``import vpdeploy`` itself loads nothing."""
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'vpdeploy' has no attribute '{name}'")
