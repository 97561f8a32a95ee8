"""Reshapes that change nothing."""

from __future__ import annotations

import onnx_ir as ir


class DropIdentityReshapePass(ir.passes.InPlacePass):
    """Drop ``Reshape`` nodes whose output has the shape of their input, symbolic sizes included.

    The exporter leaves one between any two blocks: rows to tokens and back, merged into rows to rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        outputs = set(model.graph.outputs)
        modified = False
        for node in list(model.graph):
            source = node.inputs[0] if node.op_type == "Reshape" and node.outputs[0] not in outputs else None
            if source is not None and _has_shape_of(node.outputs[0], source):
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _has_shape_of(target: ir.Value, source: ir.Value) -> bool:
    """Tell whether two shapes are known and equal; sizes without a name may differ."""
    if source.shape is None or target.shape is None or list(source.shape) != list(target.shape):
        return False
    return all(isinstance(size, int) or size.value is not None for size in source.shape)
