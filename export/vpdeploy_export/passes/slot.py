"""A switchable graph that always takes the first slot."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

from vpdeploy.format.layout import IMAGE, SLOT

_LENGTH: Final = "batch_length"
_ZEROS: Final = "first_slot"


class ZeroSlotPass(ir.passes.InPlacePass):
    """Take the first slot for every row of a batch, so that ``slot`` is no input.

    Rules:

    1. Every use of the input ``slot`` becomes a use of zeros of its type, as many as ``image`` has rows, and the input
       is taken away.
    2. A graph without an input ``slot`` is left: it takes no slot already.
    3. A graph with ``slot`` but without ``image`` is refused: nothing else tells how many rows a batch has. So is one
       in which a value already has the name of one of the two that are added, or whose output is ``slot`` itself.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse a graph in which the zeros cannot be made or have no name of their own."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if SLOT not in inputs:
            return
        if IMAGE not in inputs:
            raise ir.passes.PreconditionError(f"the graph has no input '{IMAGE}'")
        if inputs[SLOT].is_graph_output():
            raise ir.passes.PreconditionError(f"'{SLOT}' is an output of the graph, which zeros would change")
        taken = {*inputs, *graph.initializers, *(value.name for node in graph for value in node.outputs)}
        for name in (_LENGTH, _ZEROS):
            if name in taken:
                raise ir.passes.PreconditionError(f"the graph has a value named '{name}' already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the input in place."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        slot = inputs.get(SLOT)
        if slot is None:
            return ir.passes.PassResult(model, False)
        dtype = ir.DataType.INT32 if slot.dtype is None else slot.dtype

        # The number of rows, [1], and as many zeros, [B].
        length = ir.node("Shape", [inputs[IMAGE]], {"start": 0, "end": 1}, name=_LENGTH)
        zero = ir.tensor(np.zeros(1, dtype.numpy()))
        zeros = ir.node("ConstantOfShape", [length.outputs[0]], {"value": zero}, name=_ZEROS)
        length.outputs[0].name, zeros.outputs[0].name = _LENGTH, _ZEROS
        length.outputs[0].shape, length.outputs[0].dtype = ir.Shape([1]), ir.DataType.INT64
        zeros.outputs[0].shape, zeros.outputs[0].dtype = slot.shape, dtype

        # They come first, and stand wherever the input did.
        for node in (zeros, length):
            if len(graph):
                graph.insert_before(graph[0], node)
            else:
                graph.append(node)
        slot.replace_all_uses_with(zeros.outputs[0])
        graph.inputs.remove(slot)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that ``slot`` is no input."""
        if any(value.name == SLOT for value in model.graph.inputs):
            raise ir.passes.PostconditionError(f"'{SLOT}' is still an input")
