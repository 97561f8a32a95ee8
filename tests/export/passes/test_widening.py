from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vpdeploy_export.passes import WidenPass


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def parsed(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}')


def test_a_float32_graph_is_left_alone():
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negate",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert not WidenPass()(model).modified


def test_narrow_inputs_constants_and_type_attributes_are_widened():
    table = helper.make_tensor_value_info("table", TensorProto.FLOAT16, ["slots", 4])
    nodes = [
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, np.float16))),
        helper.make_node("Mul", ["table", "two"], ["double"]),
        helper.make_node("Cast", ["double"], ["again"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["again"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g", [table], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["slots", 4])]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = WidenPass()(ir.from_proto(onnx.shape_inference.infer_shapes(proto))).model
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT16
    computed = [value for node in model.graph for value in node.outputs]
    assert {value.dtype for value in computed} == {ir.DataType.FLOAT}
    values = np.array([[40000, 1, 2, 3]], np.float16)
    np.testing.assert_array_equal(run(model, table=values), 2 * values.astype(np.float32))  # 80000 is no float16
    assert not WidenPass()(model).modified


def test_values_of_other_types_are_left():
    model = parsed(
        "g (double[2] x, float16[2] h) => (double[2] y, int64[1] n, float16[2] k) "
        "{ y = Neg (x) n = Shape (x) k = Neg (h) }"
    )
    assert WidenPass()(model).modified
    kinds = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert (kinds["y"], kinds["n"], kinds["k"]) == (ir.DataType.DOUBLE, ir.DataType.INT64, ir.DataType.FLOAT)


def test_an_input_that_is_only_cast_to_float32_is_left():
    model = parsed("g (float16[2] x) => (float[2] y) { y = Cast <to = 1> (x) }")
    assert not WidenPass()(model).modified
    assert [node.op_type for node in model.graph] == ["Cast"]


def test_an_input_is_cast_once_for_all_its_uses():
    model = parsed("g (float16[2] x) => (float16[2] y) <float16[2] n> { n = Neg (x) y = Mul (n, x) }")
    assert WidenPass()(model).modified
    assert [node.op_type for node in model.graph] == ["Cast", "Neg", "Mul"]
    assert not WidenPass()(model).modified
    np.testing.assert_array_equal(run(model, x=np.array([300, 2], np.float16)), [-90000, -4])  # no float16


def test_an_input_that_nothing_uses_is_left():
    model = parsed("g (float16[2] x, float[2] z) => (float[2] y) { y = Neg (z) }")
    assert not WidenPass()(model).modified


def test_a_subgraph_is_refused():
    model = parsed(
        "g (bool c, float16[2] x) => (float16[2] y) "
        "{ y = If (c) <then_branch = a () => (float16[2] p) { p = Neg (x) },"
        " else_branch = b () => (float16[2] q) { q = Abs (x) }> }"
    )
    with pytest.raises(ir.passes.PreconditionError, match="If has a subgraph, whose values would stay narrow"):
        WidenPass()(model)
    assert model.graph[0].outputs[0].dtype == ir.DataType.FLOAT16


def test_functions_are_refused():
    text = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
    g (float16[2] x) => (float16[2] y) { y = own.twice (x) }
    <opset_import: ["" : 20], domain: "own"> twice (a) => (b) { b = Add (a, a) }"""
    with pytest.raises(ir.passes.PreconditionError, match="the graph has functions"):
        WidenPass()(ir.from_onnx_text(text))


def test_an_operator_that_names_a_narrow_type_by_an_unknown_attribute_is_refused():
    model = parsed("g (float16[2] x) => (float16[2] y) { y = RandomNormalLike <dtype = 10> (x) }")
    with pytest.raises(ir.passes.PreconditionError, match="RandomNormalLike names a narrow type by 'dtype'"):
        WidenPass()(model)
