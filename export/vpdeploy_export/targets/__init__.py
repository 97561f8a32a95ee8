"""What a bundle converts to, for users of other runtimes. A target is one file and one line in ``TARGETS``."""

from __future__ import annotations

from typing import Final

from vpdeploy_export.targets.ep_context import EP_CONTEXT
from vpdeploy_export.targets.onnx_adapter import ONNX_ADAPTER
from vpdeploy_export.targets.target import Target
from vpdeploy_export.targets.triton import TRITON

__all__ = ["TARGETS", "Target"]

TARGETS: Final[dict[str, Target]] = {
    "onnx-adapter": ONNX_ADAPTER,
    "triton": TRITON,
    "ep-context": EP_CONTEXT,
}
"""By name, as ``--to`` takes it."""
