"""A float16 or bfloat16 graph with all arithmetic in float32, on the same weights."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from vpdeploy_export.precision.narrow import NARROW

_TYPE_ATTRIBUTES: Final = {"Cast": "to", "Attention": "softmax_precision"}


class WidenPass(ir.passes.InPlacePass):
    """Give every float16 and bfloat16 value of a graph the type float32; weights keep their values.

    Graph inputs keep their types and are cast where they are used.
    """

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
                _cast_input(model.graph, value)
                modified = True
        return ir.passes.PassResult(model, modified)


def _widen_constant(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in NARROW:
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
        elif name == _TYPE_ATTRIBUTES.get(node.op_type) and ir.DataType(attribute.as_int()) in NARROW:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
            modified = True
    return modified


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    wide = ir.Value(name=f"{value.name}.wide", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    cast = ir.node("Cast", [], {"to": ir.DataType.FLOAT}, outputs=[wide], name=f"{value.name}.Cast")
    ir.convenience.replace_all_uses_with(value, wide)
    cast.resize_inputs(1)
    cast.replace_input_with(0, value)
    if len(graph):
        graph.insert_before(graph[0], cast)
    else:
        graph.append(cast)
