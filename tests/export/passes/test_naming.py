from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from vpdeploy_export.passes import NameByModulePass
from vpdeploy_export.passes.naming import module_of

SCOPES = "pkg.torch.onnx.name_scopes"


def node(operator: str, inputs: list[ir.Value], scopes: list[str] | None) -> ir.Node:
    metadata = {} if scopes is None else {SCOPES: repr(scopes)}
    return ir.Node("", operator, inputs, num_outputs=1, metadata_props=metadata)


def model_of(inputs: list[ir.Value], nodes: list[ir.Node], weights: list[ir.Value]) -> ir.Model:
    nodes[-1].outputs[0].name = "logits"
    graph = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, initializers=weights, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def weight(name: str, *shape: int, dtype: str = "float32") -> ir.Value:
    return ir.Value(
        name=name,
        const_value=ir.tensor(np.ones(shape, dtype), name=name),
        shape=ir.Shape(shape),
        type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))),
    )


@pytest.fixture
def model() -> ir.Model:
    image, matrix, shape = ir.Value(name="image"), weight("val_27", 4, 4), weight("val_3", 2, dtype="int64")
    named = weight("blocks.0.query.bias", 4)
    first = node("MatMul", [image, matrix], ["", "blocks.0", "blocks.0.query", "linear"])
    second = node("Add", [first.outputs[0], named], ["", "blocks.0", "blocks.0.query", "linear"])
    third = node("Reshape", [second.outputs[0], shape], ["", "blocks.0", "view"])
    fourth = node("Reshape", [third.outputs[0], shape], ["", "blocks.0", "view_1"])
    last = node("Identity", [fourth.outputs[0]], None)
    return model_of([image], [first, second, third, fourth, last], [matrix, shape, named])


def test_nodes_and_values_are_named_by_module_and_operator(model: ir.Model):
    assert NameByModulePass()(model).modified
    names = ["blocks.0.query.MatMul", "blocks.0.query.Add", "blocks.0.Reshape", "blocks.0.Reshape_1", "Identity"]
    assert [each.name for each in model.graph] == names
    assert [each.outputs[0].name for each in model.graph][:-1] == names[:-1]


def test_inputs_outputs_and_weights_with_a_name_keep_it(model: ir.Model):
    NameByModulePass()(model)
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert "blocks.0.query.bias" in model.graph.initializers


def test_unnamed_weights_are_named_by_the_first_node_that_reads_them(model: ir.Model):
    NameByModulePass()(model)
    initializers = model.graph.initializers
    assert set(initializers) == {"blocks.0.query.bias", "blocks.0.query.weight", "blocks.0.Reshape.constant"}
    assert all(value.name == name for name, value in initializers.items())


def test_a_second_time_changes_nothing(model: ir.Model):
    NameByModulePass()(model)
    assert not NameByModulePass()(model).modified


def test_a_value_that_is_renamed_alone_counts_as_a_change(model: ir.Model):
    NameByModulePass()(model)
    model.graph[0].outputs[0].name = "val_1"
    assert NameByModulePass()(model).modified
    assert model.graph[0].outputs[0].name == "blocks.0.query.MatMul"


def test_a_graph_that_was_not_traced_keeps_its_names(model: ir.Model):
    NameByModulePass()(model)
    names = [each.name for each in model.graph]
    for each in model.graph:
        each.metadata_props.clear()
    with pytest.raises(ir.passes.PreconditionError, match="no node of the graph says which module it was traced in"):
        NameByModulePass()(model)
    assert [each.name for each in model.graph] == names


def test_a_name_that_is_taken_is_numbered(model: ir.Model):
    model.graph.initializers["blocks.0.query.bias"].name = "blocks.0.query.MatMul"
    NameByModulePass()(model)
    assert next(iter(model.graph)).name == "blocks.0.query.MatMul_1"


@pytest.mark.parametrize(
    ("scopes", "module"),
    [
        (["", "blocks.1", "blocks.1.norm", "layer_norm"], "blocks.1.norm"),
        (["", "index_select"], ""),
        (["_empty_nn_module_stack_from_metadata_hook", "sym_size_int_5"], ""),
        (None, ""),
    ],
)
def test_the_module_is_the_innermost_scope_but_one(scopes: list[str] | None, module: str):
    assert module_of(node("Relu", [ir.Value(name="x")], scopes)) == module
