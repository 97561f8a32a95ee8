from __future__ import annotations

import onnx_ir as ir
import pytest

from vpdeploy_export.passes import ExposePass


def toy() -> ir.Model:
    return ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        toy (float[2] x) => (float[2] y) <float[1] one = {1}, float[2] a, float[2] b>
        { a = Neg (x) b = Abs (a) y = Add (b, one) }
        """
    )


def names(model: ir.Model) -> list[str | None]:
    return [value.name for value in model.graph.outputs]


def test_values_become_outputs_behind_the_others_in_the_order_of_computation():
    model = toy()
    assert ExposePass(["b", "a"])(model).modified
    assert names(model) == ["y", "a", "b"]


def test_a_second_time_changes_nothing():
    model = ExposePass(["a"])(toy()).model
    assert not ExposePass(["a"])(model).modified
    assert names(model) == ["y", "a"]


def test_an_output_is_left_where_it_is():
    model = toy()
    assert not ExposePass(["y"])(model).modified
    assert names(model) == ["y"]


@pytest.mark.parametrize("name", ["x", "one", "absent"])
def test_a_value_that_no_node_computes_is_refused(name: str):
    model = toy()
    with pytest.raises(ir.passes.PreconditionError, match=f"no node of the graph computes '{name}'"):
        ExposePass(["a", name])(model)
    assert names(model) == ["y"]


def test_a_value_of_unknown_type_is_refused():
    model = toy()
    model.graph[0].outputs[0].type = None
    with pytest.raises(ir.passes.PreconditionError, match="does not tell the type of 'a'"):
        ExposePass(["a"])(model)
