from __future__ import annotations

import onnx_ir as ir
import pytest

from vpdeploy_export.passes import DropIdentityReshapePass


def value(name: str, *shape: int | str | None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def reshaped(source: tuple[int | str | None, ...], target: tuple[int | str | None, ...]) -> ir.Model:
    """image -> Reshape -> Relu -> logits."""
    image, sizes = value("image", *source), value("sizes", len(target))
    reshape = ir.Node("", "Reshape", [image, sizes], outputs=[value("rows", *target)])
    relu = ir.Node("", "Relu", [reshape.outputs[0]], outputs=[value("logits", *target)])
    graph = ir.Graph([image, sizes], relu.outputs, nodes=[reshape, relu], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("shape", [(4, 3), ("batch", 3), ("17*batch", 48)])
def test_a_reshape_to_the_same_shape_is_dropped(shape: tuple[int | str, ...]):
    model = reshaped(shape, shape)
    assert DropIdentityReshapePass()(model).modified
    (relu,) = model.graph
    assert relu.inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((4, 3), (3, 4)),
        (("batch", 3), ("other", 3)),
        (("batch", 17, 48), ("17*batch", 48)),
        ((None, 3), (None, 3)),  # unknown sizes may differ
    ],
)
def test_any_other_reshape_stays(source: tuple[int | str | None, ...], target: tuple[int | str | None, ...]):
    model = reshaped(source, target)
    assert not DropIdentityReshapePass()(model).modified
    assert [node.op_type for node in model.graph] == ["Reshape", "Relu"]


def test_a_reshape_that_gives_the_graphs_output_stays():
    image, sizes = value("image", 4, 3), value("sizes", 2)
    node = ir.Node("", "Reshape", [image, sizes], outputs=[value("logits", 4, 3)])
    model = ir.Model(ir.Graph([image, sizes], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    assert not DropIdentityReshapePass()(model).modified
