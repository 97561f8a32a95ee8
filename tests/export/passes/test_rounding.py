from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from vpdeploy_export.passes import RoundPass

TYPES = {"fp16": (TensorProto.FLOAT16, np.float16), "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
HALF = ir.DataType.FLOAT16


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def toy() -> ir.Model:
    """y = -x + 1 and z = |-x|, all float32."""
    return ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        toy (float[2] x) => (float[2] y, float[2] z) <float[1] one = {1}, float[2] turned, int64[1] size>
        {
            turned = Neg (x)
            y = Add (turned, one)
            z = Abs (turned)
            size = Shape (x)
        }
        """
    )


@pytest.mark.parametrize("value", [1.0, -3.14159, 65519.0, 65520.0, 1e-7, 6e-8, 0.0, 2.0**-24, 3.3e38])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_is_that_of_the_type_from_the_smallest_to_the_largest(precision: str, value: float):
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negate",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    kind, dtype = TYPES[precision]
    result = RoundPass(["y"], ir.DataType(kind))(model)
    assert result.modified
    with np.errstate(over="ignore"):
        expected = np.array([-value], np.float32).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(run(result.model, x=np.array([value], np.float32))[0], expected)


def test_a_second_time_changes_nothing():
    model = RoundPass(["turned", "y"], HALF)(toy()).model
    nodes = [node.name for node in model.graph]
    assert not RoundPass(["turned", "y"], HALF)(model).modified
    assert [node.name for node in model.graph] == nodes


def test_all_uses_take_the_rounded_value_and_values_that_are_not_named_stay_exact():
    model = RoundPass(["turned"], HALF)(toy()).model
    x = np.array([1 / 3, 2049], np.float32)
    y, z = run(model, x=x)
    rounded = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y, 1 - rounded)  # 1 - 1/3 rounded is no float16: the sum is exact
    np.testing.assert_array_equal(z, rounded)
    assert not np.array_equal(y, y.astype(np.float16))


def test_a_graph_output_keeps_its_name_and_gives_the_rounded_value():
    model = RoundPass(["y"], HALF)(toy()).model
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    y, _ = run(model, x=np.array([1 / 3, 0], np.float32))
    np.testing.assert_array_equal(y, y.astype(np.float16).astype(np.float32))
    assert "y.exact" in {value.name for node in model.graph for value in node.outputs}


def test_no_names_change_nothing():
    assert not RoundPass([], HALF)(toy()).modified


@pytest.mark.parametrize("name", ["x", "one", "absent"])
def test_a_value_that_no_node_computes_is_refused(name: str):
    model = toy()
    with pytest.raises(ir.passes.PreconditionError, match=f"no node of the graph computes '{name}'"):
        RoundPass(["y", name], HALF)(model)
    assert len(model.graph) == 4


def test_a_value_that_is_not_float32_is_refused():
    with pytest.raises(ir.passes.PreconditionError, match="not float32, so not to be rounded: 'size'"):
        RoundPass(["size"], HALF)(toy())
