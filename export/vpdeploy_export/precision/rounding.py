"""Rounding to a narrow type after every operation, as a runtime with kernels of that type does.

ONNX Runtime's CPU provider runs float16 graphs in float32 and rounds only where it must, so that a product that
overflows float16 passes unseen; bfloat16 graphs it does not run at all.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir


class RoundPass(ir.passes.InPlacePass):
    """Round values of a float32 graph to another type and back; beyond that type's range they become infinite.

    Args:
        names: Of the values; the rounded ones take over the names.
        dtype: What to round to.
    """

    def __init__(self, names: Collection[str], dtype: ir.DataType) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert a pair of casts behind each value."""
        modified = False
        for node in list(model.graph):
            for value in node.outputs:
                if value.name in self.names:
                    self._round(model.graph, node, value)
                    modified = True
        return ir.passes.PassResult(model, modified)

    def _round(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        name = value.name
        value.name = f"{name}.exact"
        narrow = ir.Value(name=f"{name}.narrow", type=ir.TensorType(self.dtype), shape=value.shape)
        rounded = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
        down = ir.node("Cast", [value], {"to": self.dtype}, outputs=[narrow], name=f"{name}.narrow")
        up = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT}, outputs=[rounded], name=f"{name}.rounded")
        graph.insert_after(node, [down, up])
