"""Passes that turn the inputs of a switchable graph into initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vpdeploy.errors import BundleCorruptError
from vpdeploy.layout import BATCH_AXIS, IMAGE, LOGITS, SLOT
from vpdeploy.tensorfile import Tensors

FREE_INITIALIZERS_IR_VERSION = 4
"""From this IR version on, an initializer need not be an input; one that is, is a default that a run may override."""


class TableDefaults(ir.passes.InPlacePass):
    """Give the table inputs a default: one slot, which a run may override with another one of any length.

    Args:
        tensors: One slot by input name, [1, ...].
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Register the defaults; named sizes stay dynamic, the slots are one."""
        model.ir_version = max(model.ir_version, FREE_INITIALIZERS_IR_VERSION)
        for name, array in self.tensors.items():
            value = _input(model.graph, name)
            assert value.shape is not None
            value.shape = ir.Shape([1, *value.shape.dims[1:]])
            value.const_value = ir.Tensor(array, name=name)
            model.graph.register_initializer(value)
        return ir.passes.PassResult(model, True)


class TableConstants(ir.passes.InPlacePass):
    """Turn the table inputs into constants.

    Args:
        arrays: The table by input name, [S, ...].
        classes: C of the table; the size of the output.
    """

    def __init__(self, arrays: Tensors, classes: int) -> None:
        self.arrays = arrays
        self.classes = classes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Take the table inputs from the graph's inputs."""
        model.ir_version = max(model.ir_version, FREE_INITIALIZERS_IR_VERSION)
        for name, array in self.arrays.items():
            value = _input(model.graph, name)
            model.graph.inputs.remove(value)
            value.shape = ir.Shape(array.shape)
            value.const_value = ir.Tensor(array, name=name)
            model.graph.register_initializer(value)
        for output in model.graph.outputs:
            if output.name == LOGITS:
                output.shape = ir.Shape([BATCH_AXIS, self.classes])
        return ir.passes.PassResult(model, True)


class ZeroSlot(ir.passes.InPlacePass):
    """Take the first slot for every row of a batch, so that ``slot`` is no input."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the input by zeros of the batch's length."""
        graph = model.graph
        slot, image = _input(graph, SLOT), _input(graph, IMAGE)
        length = ir.node("Shape", [image], {"start": 0, "end": 1})
        zeros = ir.node("ConstantOfShape", [length.outputs[0]], {"value": ir.tensor(np.zeros(1, np.int32))})
        for node, name in ((length, "batch_length"), (zeros, "first_slot")):
            node.name = node.outputs[0].name = name
        graph.insert_before(graph[0], [length, zeros])
        zeros.outputs[0].shape, zeros.outputs[0].type = slot.shape, slot.type
        slot.replace_all_uses_with(zeros.outputs[0])
        graph.inputs.remove(slot)
        return ir.passes.PassResult(model, True)


def _input(graph: ir.Graph, name: str) -> ir.Value:
    """Return a graph input.

    Raises:
        BundleCorruptError: There is none of that name.
    """
    for value in graph.inputs:
        if value.name == name:
            return value
    raise BundleCorruptError(f"the bundle's graph has no input '{name}'; export again")
