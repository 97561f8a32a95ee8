"""A float16 or bfloat16 graph with all arithmetic in float32, on the same weights."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from vpdeploy_export.passes.narrow import NARROW

_TYPE_ATTRIBUTES: Final = {("Cast", "to"), ("Attention", "softmax_precision")}
"""Attributes that name a type, by operator, and that may name float32 instead of a narrow one."""

_OTHER_TYPE_ATTRIBUTES: Final = frozenset({"dtype", "output_dtype", "stash_type", "to", "softmax_precision"})


class WidenPass(ir.passes.InPlacePass):
    """Give every float16 and bfloat16 value of a graph the type float32; weights keep their values.

    Rules:

    1. A narrow constant, an initializer or a node's attribute, becomes float32 with the same numbers, which float32
       holds exactly.
    2. A cast to a narrow type becomes one to float32, and attention with a narrow softmax one with softmax in float32.
    3. A computed value of narrow type is float32 from then on; its name and shape stay.
    4. A narrow graph input keeps its type and its default, for callers give that type. It is cast to float32 once, for
       all its uses but those that are casts to float32 themselves; where there are no others, it is left.
    5. Values of other types are left, integers and float64 among them.
    6. A graph with subgraphs or functions is refused, because their values would keep their types. So is an operator
       that names a narrow type by an attribute that rule 2 does not know.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse a graph of which a part would stay narrow."""
        if model.functions:
            raise ir.passes.PreconditionError("the graph has functions, whose values would stay narrow")
        for node in model.graph:
            for name, attribute in node.attributes.items():
                if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    raise ir.passes.PreconditionError(f"{node.op_type} has a subgraph, whose values would stay narrow")
                if name in _OTHER_TYPE_ATTRIBUTES and _names_narrow(attribute) and not _is_known(node, name):
                    raise ir.passes.PreconditionError(f"{node.op_type} names a narrow type by '{name}'")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen in place."""
        modified = False
        for value in model.graph.initializers.values():
            modified |= _widen_constant(value)
        for node in model.graph:
            modified |= _widen_attributes(node)
            for output in node.outputs:
                if output.dtype in NARROW:
                    output.dtype = ir.DataType.FLOAT
                    modified = True
        for value in model.graph.inputs:
            if value.dtype in NARROW:
                modified |= _cast_input(model.graph, value)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that nothing narrow is left but graph inputs."""
        graph = model.graph
        values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.dtype in NARROW and not value.is_graph_input():
                raise ir.passes.PostconditionError(f"'{value.name}' is still {value.dtype}")


def _is_known(node: ir.Node, name: str) -> bool:
    return (node.op_type, name) in _TYPE_ATTRIBUTES


def _names_narrow(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.INT and attribute.as_int() in NARROW


def _widen_constant(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in NARROW or value.is_graph_input():
        return False
    value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
    value.dtype = ir.DataType.FLOAT
    return True


def _widen_attributes(node: ir.Node) -> bool:
    modified = False
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in NARROW:
            wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
            node.attributes[name] = ir.AttrTensor(name, wide)
            modified = True
        elif _is_known(node, name) and _names_narrow(attribute):
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
            modified = True
    return modified


def _cast_input(graph: ir.Graph, value: ir.Value) -> bool:
    """Cast an input for those of its uses that need it; tell whether there are any."""
    needing = [use for use in value.uses() if not _casts_to_float32(use.node)]
    if not needing:
        return False
    wide = ir.Value(name=f"{value.name}.wide", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[wide], name=f"{value.name}.Cast")
    for use in needing:
        use.node.replace_input_with(use.idx, wide)
    graph.insert_before(graph[0], cast)
    return True


def _casts_to_float32(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT
