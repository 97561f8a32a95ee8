"""On a graph small enough to work out by hand: logits = image · 0 + weight[slot] + bias[slot]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from vpdeploy_export.passes import TableConstantsPass, TableDefaultsPass, ZeroSlotPass

WEIGHT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)  # three slots, two classes
BIAS = np.array([[10, 20], [30, 40], [50, 60]], np.float32)


def toy() -> ir.Model:
    """A switchable graph with two table inputs."""
    return ir.from_onnx_text(
        """
        <ir_version: 3, opset_import: ["" : 20]>
        toy (uint8[batch, 1, 1, 3] image, int32[batch] slot, float[slots, classes] weight, float[slots, classes] bias)
            => (float[batch, classes] logits)
        {
            rows = Gather <axis = 0> (weight, slot)
            shifts = Gather <axis = 0> (bias, slot)
            logits = Add (rows, shifts)
        }
        """
    )


def run(model: ir.Model, path: Path, **inputs: np.ndarray) -> np.ndarray:
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    given = {node.name for node in session.get_inputs()}
    (logits,) = session.run(None, {name: value for name, value in inputs.items() if name in given})
    return np.asarray(logits)


@pytest.mark.parametrize("batch", [1, 5])
def test_every_row_takes_the_first_slot(tmp_path: Path, batch: int):
    model = ZeroSlotPass()(toy()).model
    assert [value.name for value in model.graph.inputs] == ["image", "weight", "bias"]
    images = np.zeros((batch, 1, 1, 3), np.uint8)
    found = run(model, tmp_path / "x.onnx", image=images, weight=WEIGHT, bias=BIAS)
    np.testing.assert_array_equal(found, [[11, 22]] * batch)


def test_defaults_answer_until_a_run_overrides_them_with_another_length(tmp_path: Path):
    model = TableDefaultsPass({"weight": WEIGHT[:1], "bias": BIAS[:1]})(toy()).model
    assert model.ir_version >= 4
    assert [value.name for value in model.graph.inputs] == ["image", "slot", "weight", "bias"]
    assert [dim if isinstance(dim, int) else dim.value for dim in model.graph.inputs[2].shape] == [1, "classes"]
    rows = {"image": np.zeros((2, 1, 1, 3), np.uint8), "slot": np.zeros(2, np.int32)}
    ir.save(model, tmp_path / "x.onnx")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", settings, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, rows)[0], [[11, 22]] * 2)
    longer = {"weight": np.array([[7, 8, 9]], np.float32), "bias": np.array([[70, 80, 90]], np.float32)}
    np.testing.assert_array_equal(session.run(None, {**rows, **longer})[0], [[77, 88, 99]] * 2)


def test_a_constant_table_leaves_image_and_slot(tmp_path: Path):
    model = TableConstantsPass({"weight": WEIGHT, "bias": BIAS}, 2)(toy()).model
    assert [value.name for value in model.graph.inputs] == ["image", "slot"]
    assert list(model.graph.outputs[0].shape)[1] == 2
    found = run(model, tmp_path / "x.onnx", image=np.zeros((3, 1, 1, 3), np.uint8), slot=np.array([2, 0, 1], np.int32))
    np.testing.assert_array_equal(found, [[55, 66], [11, 22], [33, 44]])


@pytest.fixture(params=["defaults", "constants", "slot"])
def rewriting(request: pytest.FixtureRequest) -> ir.passes.InPlacePass:
    return {
        "defaults": TableDefaultsPass({"weight": WEIGHT[:1], "bias": BIAS[:1]}),
        "constants": TableConstantsPass({"weight": WEIGHT, "bias": BIAS}, 2),
        "slot": ZeroSlotPass(),
    }[request.param]


def test_a_second_time_changes_nothing(rewriting: ir.passes.InPlacePass):
    model = toy()
    assert rewriting(model).modified
    written = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not rewriting(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == written


def test_other_numbers_replace_a_default():
    model = toy()
    TableDefaultsPass({"weight": WEIGHT[:1], "bias": BIAS[:1]})(model)
    assert TableDefaultsPass({"weight": WEIGHT[1:2], "bias": BIAS[:1]})(model).modified
    np.testing.assert_array_equal(model.graph.initializers["weight"].const_value.numpy(), WEIGHT[1:2])


def test_other_numbers_do_not_replace_a_constant():
    model = TableConstantsPass({"weight": WEIGHT, "bias": BIAS}, 2)(toy()).model
    with pytest.raises(ir.passes.PreconditionError, match="the graph has no input 'weight'"):
        TableConstantsPass({"weight": WEIGHT + 1, "bias": BIAS}, 2)(model)
    np.testing.assert_array_equal(model.graph.initializers["weight"].const_value.numpy(), WEIGHT)


def test_a_constant_gets_no_default():
    model = TableConstantsPass({"weight": WEIGHT, "bias": BIAS}, 2)(toy()).model
    with pytest.raises(ir.passes.PreconditionError, match="the graph has no input 'bias'"):
        TableDefaultsPass({"bias": BIAS[:1]})(model)


def test_a_newer_ir_version_stays():
    for rewriting in (TableDefaultsPass({"weight": WEIGHT[:1]}), TableConstantsPass({"weight": WEIGHT}, 2)):
        model = toy()
        model.ir_version = 10
        rewriting(model)
        assert model.ir_version == 10


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("prefix_key", WEIGHT, "the graph has no input 'prefix_key'"),
        ("weight", WEIGHT.astype(np.float16), "input 'weight' is FLOAT, its tensor FLOAT16"),
        ("weight", WEIGHT[..., None], r"input 'weight' has shape \[.*\], its tensor \(3, 2, 1\)"),
        ("image", np.zeros((1, 1, 1, 4), np.uint8), r"input 'image' has shape \[.*\], its tensor \(1, 1, 1, 4\)"),
    ],
)
def test_a_tensor_that_fits_no_input_is_refused_and_nothing_changed(name: str, array: np.ndarray, reason: str):
    for rewriting in (
        TableDefaultsPass({"bias": BIAS, name: array}),
        TableConstantsPass({"bias": BIAS, name: array}, 2),
    ):
        model = toy()
        with pytest.raises(ir.passes.PreconditionError, match=reason):
            rewriting(model)
        assert not model.graph.initializers


def test_a_graph_without_logits_takes_no_constants():
    model = toy()
    model.graph.outputs[0].name = "features"
    with pytest.raises(ir.passes.PreconditionError, match="the graph has no output 'logits'"):
        TableConstantsPass({"weight": WEIGHT}, 2)(model)


def test_a_graph_that_takes_no_slot_is_left():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Neg (x) }'
    )
    assert not ZeroSlotPass()(model).modified
    assert len(model.graph) == 1


def test_slots_without_images_are_refused():
    model = toy()
    model.graph.inputs.pop(0)
    with pytest.raises(ir.passes.PreconditionError, match="the graph has no input 'image'"):
        ZeroSlotPass()(model)


def test_a_name_that_zeros_would_need_twice_is_refused():
    model = toy()
    model.graph[0].outputs[0].name = "first_slot"
    with pytest.raises(ir.passes.PreconditionError, match="has a value named 'first_slot' already"):
        ZeroSlotPass()(model)
    assert [value.name for value in model.graph.inputs] == ["image", "slot", "weight", "bias"]


def test_slots_that_are_an_output_are_refused():
    model = toy()
    model.graph.outputs.append(model.graph.inputs[1])
    with pytest.raises(ir.passes.PreconditionError, match="'slot' is an output of the graph"):
        ZeroSlotPass()(model)
