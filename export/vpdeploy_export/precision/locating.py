"""Where in the model a value of a written graph belongs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from vpdeploy_export.precision.islands import Part
from vpdeploy_export.precision.probe import part_of

_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)")
_STEPS: Final = 6  # from the logits' product to the softmax: a cast, a mask, parts joined
_BETWEEN: Final = frozenset({"Cast", "Add", "Mul", "Concat", "Reshape", "Transpose", "Pad"})


@dataclass(frozen=True, kw_only=True)
class Location:
    """A value's place.

    Attributes:
        block: The block, 0 to L - 1; None before the first and behind the last.
        part: The part of the block, or ``embedding`` or ``head`` outside of the blocks.
        name: The value's name in the graph.
    """

    block: int | None
    part: Part | str
    name: str

    def describe(self) -> str:
        """Return it in words, e.g. ``block 3, mlp (blocks.3.mlp.fc1.MatMul)``."""
        return f"{self.part} ({self.name})" if self.block is None else f"block {self.block}, {self.part} ({self.name})"


def locate(node: ir.Node, value: ir.Value) -> Location:
    """Return the place of a value by its node's name, which is that of the module it was traced in."""
    name = value.name or ""
    match = _BLOCK.match(node.name or "")
    if match is None:
        return Location(
            block=None, part="embedding" if (node.name or "").startswith("embedding") else "head", name=name
        )
    module, _, _operator = match[2].rpartition(".")
    return Location(block=int(match[1]), part=part_of(module) if module else _part_without_module(node), name=name)


def _part_without_module(node: ir.Node) -> Part:
    """Tell a residual addition from what attention does between its layers."""
    computed = [each for each in node.inputs if each is not None and each.producer() is not None]
    if node.op_type == "Add" and len(computed) == len(node.inputs) and not leads_to_softmax(node):
        # Behind a layer's own product of three axes its bias is added too, but that is a constant.
        return "residual"
    return "attention"


def leads_to_softmax(node: ir.Node) -> bool:
    """Tell whether an operation's result reaches a softmax by casts, masks and joins alone."""
    reached = [node]
    for _ in range(_STEPS):
        consumers = [user for each in reached for output in each.outputs for user in output.consumers()]
        if any(user.op_type == "Softmax" for user in consumers):
            return True
        reached = [user for user in consumers if user.op_type in _BETWEEN]
    return False
