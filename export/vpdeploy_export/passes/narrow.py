"""The two narrow types, and which values of a graph have them."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from vpdeploy.errors import ExportError
from vpdeploy.format.graphfacts import Precision

TYPES: Final[dict[Precision, ir.DataType]] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NARROW: Final = frozenset(TYPES.values())

TITLES: Final[dict[Precision, str]] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What messages call a precision."""

_MOVES: Final = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)


def moves_only(node: ir.Node) -> bool:
    """Tell whether an operation passes numbers on as they are."""
    return node.op_type in _MOVES


def narrow_results(model: ir.Model, dtype: ir.DataType) -> list[str]:
    """Return the names of the values of a type that an operation has computed, in the graph's order.

    Raises:
        ExportError: A value's type is unknown.
    """
    names = []
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and value.name:
                raise ExportError(f"the graph does not tell the type of '{value.name}'; export it again")
            if value.dtype == dtype and not moves_only(node):
                names.append(value.name or "")
    return names
