"""The passes alone, on a graph small enough to work out by hand: logits = image · 0 + weight[slot] + bias[slot]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from vpdeploy.errors import BundleCorruptError
from vpdeploy_export.targets.rewriting import TableConstants, TableDefaults, ZeroSlot

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
    model = ZeroSlot()(toy()).model
    assert [value.name for value in model.graph.inputs] == ["image", "weight", "bias"]
    images = np.zeros((batch, 1, 1, 3), np.uint8)
    found = run(model, tmp_path / "x.onnx", image=images, weight=WEIGHT, bias=BIAS)
    np.testing.assert_array_equal(found, [[11, 22]] * batch)


def test_defaults_answer_until_a_run_overrides_them_with_another_length(tmp_path: Path):
    model = TableDefaults({"weight": WEIGHT[:1], "bias": BIAS[:1]})(toy()).model
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
    model = TableConstants({"weight": WEIGHT, "bias": BIAS}, 2)(toy()).model
    assert [value.name for value in model.graph.inputs] == ["image", "slot"]
    assert list(model.graph.outputs[0].shape)[1] == 2
    found = run(model, tmp_path / "x.onnx", image=np.zeros((3, 1, 1, 3), np.uint8), slot=np.array([2, 0, 1], np.int32))
    np.testing.assert_array_equal(found, [[55, 66], [11, 22], [33, 44]])


def test_a_graph_without_an_input_of_the_layout_is_refused():
    with pytest.raises(BundleCorruptError, match="the bundle's graph has no input 'prefix_key'; export again"):
        TableConstants({"prefix_key": WEIGHT}, 2)(toy())
