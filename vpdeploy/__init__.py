"""vpdeploy: prompt-tuned vision transformers in production.

``load`` opens what ``vpdeploy export`` wrote; training and exporting live in ``vpdeploy_train`` and
``vpdeploy_export``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpdeploy.session import Session as Session
    from vpdeploy.session import open_session as load

__all__ = ["Session", "__version__", "load"]

__version__ = "0.1.0"

_LAZY = {"load": "open_session", "Session": "Session"}


def __getattr__(name: str) -> Any:
    """Import the session when it is first asked for: ``import vpdeploy`` itself loads nothing."""
    if name in _LAZY:
        from vpdeploy import session

        return getattr(session, _LAZY[name])
    raise AttributeError(f"module 'vpdeploy' has no attribute '{name}'")
