"""Values inside a graph as further outputs of it."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir


class ExposePass(ir.passes.InPlacePass):
    """Make computed values outputs of the graph, so that a run gives them.

    Rules:

    1. A named value that a node of the graph computes becomes an output, behind those that are there, in the order of
       computation.
    2. A named value that is an output already is left where it is.
    3. Graph inputs and constants cannot be exposed: no node computes them. Neither can a value of unknown type, for an
       output has to state its own. Both are refused.

    Args:
        names: The names of the values.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def requires(self, model: ir.Model) -> None:
        """Refuse names of values that no node computes, or of unknown type."""
        computed = {value.name: value for node in model.graph for value in node.outputs}
        for name in sorted(self.names):
            if name not in computed:
                raise ir.passes.PreconditionError(f"no node of the graph computes '{name}', so it cannot be an output")
            if computed[name].type is None:
                raise ir.passes.PreconditionError(f"the graph does not tell the type of '{name}'")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Extend the outputs in place."""
        given = {value.name for value in model.graph.outputs}
        further = [value for node in model.graph for value in node.outputs if value.name in self.names - given]
        model.graph.outputs.extend(further)
        return ir.passes.PassResult(model, bool(further))

    def ensures(self, model: ir.Model) -> None:
        """Check that all named values are outputs."""
        missing = self.names - {value.name for value in model.graph.outputs}
        if missing:
            raise ir.passes.PostconditionError(f"still no outputs: {', '.join(sorted(missing))}")
