"""Names that say where in the model a node, a value or a weight belongs."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # written by torch's exporter: the modules a node was traced in, outermost first
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what it writes for sizes of the graph's inputs
_MACHINE_MADE = re.compile(r"val_\d+|.*/shape|scalar_tensor_default(_\d+)?|_tensor_constant\d+")


class NameByModulePass(ir.passes.InPlacePass):
    """Name nodes and values ``MODULE.OPERATOR``, numbered where a module has several; name unnamed weights alike.

    ``blocks.3.mlp.fc1.MatMul`` is found again in a profile, in an engine's layers and in an error message; ``val_98``
    is not.

    Rules:

    1. A node is named for the innermost module it was traced in and for its operator; one that was traced outside of
       all modules for its operator alone. A name that is taken is numbered.
    2. What a node computes first has the node's name, its further outputs are numbered from 1.
    3. An initializer whose name the exporter made up is named for the module of the first node that reads it:
       ``MODULE.weight`` with two or more axes of floating-point numbers, else ``NODE.constant``.
    4. Graph inputs and outputs keep their names, for callers know them by these, and so do initializers that the
       model's author named.
    5. A graph none of whose nodes says where it was traced is refused: it would lose the names it has. It was not
       traced by torch, or has been cleaned of what the tracer noted.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse a graph without the tracer's notes."""
        if not any(_SCOPES in node.metadata_props for node in model.graph):
            raise ir.passes.PreconditionError("no node of the graph says which module it was traced in")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename in place."""
        graph = model.graph
        taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
        outputs = set(graph.outputs)
        modified = False
        for node in graph:
            # The node, and with it what it computes.
            module = module_of(node)
            name = _free(f"{module}.{node.op_type}" if module else node.op_type, taken)
            modified |= node.name != name
            node.name = name
            for index, value in enumerate(node.outputs):
                if value not in outputs:
                    fresh = name if index == 0 else f"{name}.{index}"
                    modified |= value.name != fresh
                    value.name = fresh

            # The weights that it is the first to read.
            for value in _unnamed_weights(node, graph):
                fresh = _free(f"{module or name}.weight" if _is_weight(value) else f"{name}.constant", taken)
                graph.initializers.pop(value.name or "")
                value.name = fresh
                graph.initializers[fresh] = value
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that no two nodes have one name."""
        counts = Counter(node.name or "" for node in model.graph)
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise ir.passes.PostconditionError(f"several nodes are named {', '.join(twice)}")


def module_of(node: ir.Node) -> str:
    """Return the dotted name of the innermost module that a node was traced in, empty for the model itself."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    name = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if name == _NO_MODULE else name


def _unnamed_weights(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    for value in node.inputs:
        if value is not None and value.name in graph.initializers and _MACHINE_MADE.fullmatch(value.name or ""):
            yield value


def _is_weight(value: ir.Value) -> bool:
    return (
        value.dtype is not None and value.dtype.is_floating_point() and value.shape is not None and len(value.shape) > 1
    )


def _free(name: str, taken: set[str | None]) -> str:
    """Return the name, numbered from 1 if it is taken, and take it."""
    chosen, number = name, 0
    while chosen in taken:
        number += 1
        chosen = f"{name}_{number}"
    taken.add(chosen)
    return chosen
