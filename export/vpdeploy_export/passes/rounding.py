"""Rounding to a narrow type after every operation, as a runtime with kernels of that type does.

ONNX Runtime's CPU provider runs float16 graphs in float32 and rounds only where it must, so that a product that
overflows float16 passes unseen; bfloat16 graphs it does not run at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir


class RoundPass(ir.passes.InPlacePass):
    """Round values of a float32 graph to another type and back; beyond that type's range they become infinite.

    Rules:

    1. Behind every named value stands a pair of casts, to the type and back to float32. What they give takes over the
       value's name and all its uses, those as a graph output included; the exact value is called ``NAME.exact``.
    2. A value that is cast from the type holds only numbers of it: it is left.
    3. Values that are not named are left, and so are values inside subgraphs.
    4. A named value that no node of the graph computes is refused: graph inputs keep their type and constants are
       stored rounded. So is one that is not float32, for the casts would change its type.

    Args:
        names: The names of the values.
        dtype: The type to round to.
    """

    def __init__(self, names: Collection[str], dtype: ir.DataType) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.dtype = dtype

    def requires(self, model: ir.Model) -> None:
        """Refuse names of values that are not computed, or not in float32."""
        missing = self.names - {value.name for _, value in self._named(model)}
        if missing:
            raise ir.passes.PreconditionError(f"no node of the graph computes {_listed(missing)}")
        if odd := {value.name or "" for _, value in self._named(model) if value.dtype != ir.DataType.FLOAT}:
            raise ir.passes.PreconditionError(f"not float32, so not to be rounded: {_listed(odd)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert a pair of casts behind each value, in place."""
        exact = [(node, value) for node, value in self._named(model) if not self._is_rounded(node)]
        for node, value in exact:
            self._round(model.graph, node, value)
        return ir.passes.PassResult(model, bool(exact))

    def ensures(self, model: ir.Model) -> None:
        """Check that every named value is cast from the type."""
        if left := {value.name or "" for node, value in self._named(model) if not self._is_rounded(node)}:
            raise ir.passes.PostconditionError(f"not rounded: {_listed(left)}")

    def _named(self, model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
        for node in model.graph:
            for value in node.outputs:
                if value.name in self.names:
                    yield node, value

    def _is_rounded(self, node: ir.Node) -> bool:
        source = node.inputs[0] if node.op_type == "Cast" else None
        return source is not None and source.dtype == self.dtype

    def _round(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        name = value.name
        value.name = f"{name}.exact"
        narrow = ir.Value(name=f"{name}.narrow", type=ir.TensorType(self.dtype), shape=value.shape)
        rounded = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
        down = ir.node("Cast", [value], {"to": self.dtype}, outputs=[narrow], name=f"{name}.narrow")
        up = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT}, outputs=[rounded], name=f"{name}.rounded")
        graph.insert_after(node, [down, up])


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))
