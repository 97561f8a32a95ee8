"""Widening and rounding, each alone, on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vpdeploy.errors import ExportError
from vpdeploy_export.passes.narrow import narrow_results
from vpdeploy_export.precision.twins import rounded_twin, wide_twin

TYPES = {"fp16": (TensorProto.FLOAT16, np.float16), "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(8, 16)), RNG.normal(size=(16, 4))


def chain(precision: str, *, scale: float = 1.0) -> onnx.ModelProto:
    """Return x -> cast -> MatMul -> Reshape -> Sigmoid -> MatMul -> cast, [B, 8] to [B, 4]; both casts in float32."""
    kind, dtype = TYPES[precision]
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=kind),
        helper.make_node("MatMul", ["narrow", "first"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["moved"]),
        helper.make_node("Mul", ["moved", "gain"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "second"], ["result"]),
        helper.make_node("Cast", ["result"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = {
        "first": (FIRST * scale).astype(dtype),
        "gain": np.array(1 / scale, dtype),
        "second": SECOND.astype(dtype),
        "shape": np.array([-1, 16], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: ir.Model | onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def by_hand(precision: str, x: np.ndarray, *, scale: float = 1.0) -> np.ndarray:
    """Every operation in float32, its result rounded."""
    dtype = TYPES[precision][1]

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(dtype).astype(np.float32)

    with np.errstate(over="ignore", invalid="ignore"):
        product = rounded(rounded(x) @ rounded((FIRST * scale).astype(np.float32)))
        scaled = rounded(product * rounded(np.array(1 / scale, np.float32)))
        return rounded(scaled @ rounded(SECOND.astype(np.float32)))


@pytest.fixture
def x() -> np.ndarray:
    return RNG.normal(size=(5, 8)).astype(np.float32)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_rounded_twin_rounds_after_every_operation(tmp_path: Path, precision: str, x: np.ndarray):
    onnx.save(chain(precision), tmp_path / "narrow.onnx")
    found = run(rounded_twin(tmp_path / "narrow.onnx", precision), x=x)  # type: ignore[arg-type]
    expected = by_hand(precision, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    exact = x @ FIRST @ SECOND
    step = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    assert step / 8 < np.abs(found - exact).max() / np.abs(exact).max() < 8 * step


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_wide_twin_has_the_narrow_weights_and_float32_arithmetic(tmp_path: Path, precision: str, x: np.ndarray):
    onnx.save(chain(precision), tmp_path / "narrow.onnx")
    first, second = (array.astype(TYPES[precision][1]).astype(np.float64) for array in (FIRST, SECOND))
    found = run(wide_twin(tmp_path / "narrow.onnx"), x=x)
    np.testing.assert_allclose(found, x @ first @ second, rtol=1e-5, atol=1e-5)


def test_an_overflow_that_onnx_runtime_does_not_show_is_seen(tmp_path: Path, x: np.ndarray):
    model = chain("fp16", scale=16384.0)  # the product reaches 1e5, the scaled one is ordinary again
    onnx.save(model, tmp_path / "narrow.onnx")
    assert np.abs(x @ FIRST).max() * 16384 > 65504
    assert np.isfinite(run(model, x=x)).all()
    found = run(rounded_twin(tmp_path / "narrow.onnx", "fp16"), x=x)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(by_hand("fp16", x, scale=16384.0)))
    assert not np.isfinite(found).all()


def test_values_that_are_only_moved_are_not_rounded_again():
    model = ir.from_proto(chain("fp16"))
    assert narrow_results(model, ir.DataType.FLOAT16) == ["narrow", "product", "scaled", "result"]
    assert narrow_results(model, ir.DataType.BFLOAT16) == []


def test_a_value_of_unknown_type_is_an_error():
    proto = chain("fp16")
    del proto.graph.value_info[:]
    with pytest.raises(ExportError, match="does not tell the type of 'narrow'; export it again"):
        narrow_results(ir.from_proto(proto), ir.DataType.FLOAT16)
