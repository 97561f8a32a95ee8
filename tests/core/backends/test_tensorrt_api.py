"""The native runner calls nothing that the real modules lack: its fakes are held against them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from core.backends.fake_tensorrt import fake_module
from core.backends.host_device import HostDevice
from core.engines.stand_in import REMOVED_IN_11

STUBS = Path(__file__).parents[1] / "engines" / "tensorrt_10_13.json"
"""Members of TensorRT 10.13's classes, as tensorrt-stubs has them."""

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext", "Refitter", "OnnxParserRefitter")
RTX_CLASSES = ("IRuntimeConfig", "IRuntimeCache")

# What the fakes have for their own use.
_OWN = {"context_class", "error"}


def public(kind: Any) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")} - _OWN


def test_the_fake_of_tensorrt_rtx_has_nothing_that_the_module_lacks():
    real = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    fake, _ = fake_module("tensorrt-rtx", HostDevice())
    assert {name for name in vars(fake) if name[0] != "_"} <= set(dir(real))
    for name in (*CLASSES, *RTX_CLASSES):
        assert public(getattr(fake, name)) <= set(dir(getattr(real, name))), name
    for config in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(real.IRuntimeConfig, config)
    for name in (
        "DataType",
        "TensorIOMode",
        "ExecutionContextAllocationStrategy",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
        "CudaGraphStrategy",
        "DynamicShapesKernelSpecializationStrategy",
    ):
        assert set(getattr(fake, name).__members__) <= set(getattr(real, name).__members__), name


def test_the_fake_of_tensorrt_has_nothing_that_its_stubs_lack():
    stubs = json.loads(STUBS.read_text())["classes"]
    fake, _ = fake_module("tensorrt", HostDevice())
    for name in CLASSES:
        assert public(getattr(fake, name)) <= set(stubs[name]), name
    for name in ("DataType", "TensorIOMode", "ExecutionContextAllocationStrategy"):
        assert set(getattr(fake, name).__members__) <= set(stubs[name]), name


def test_a_header_is_enough_to_ask_whether_an_engine_is_valid():
    real = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    from vpdeploy.engines.toolkit import load_toolkit

    made = real.Runtime(load_toolkit("tensorrt-rtx").logger)
    validity, diagnostics = made.get_engine_validity(bytes(made.engine_header_size))
    assert validity == real.EngineValidity.INVALID
    members = real.EngineInvalidityDiagnostics.__members__.values()
    assert any(int(diagnostics) & int(member) for member in members)


CALLED = [
    ("Runtime", "deserialize_cuda_engine", 1),
    ("Runtime", "get_engine_validity", 1),
    ("ICudaEngine", "create_execution_context", 1),
    ("ICudaEngine", "create_runtime_config", 0),
    ("ICudaEngine", "get_tensor_profile_shape", 2),
    ("IExecutionContext", "set_device_memory", 2),
    ("IExecutionContext", "set_input_shape", 2),
    ("IExecutionContext", "set_tensor_address", 2),
    ("IExecutionContext", "execute_async_v3", 1),
    ("IRuntimeConfig", "set_runtime_cache", 1),
    ("IRuntimeConfig", "set_execution_context_allocation_strategy", 1),
    ("IRuntimeCache", "deserialize", 1),
    ("IRuntimeCache", "serialize", 0),
    ("OnnxParserRefitter", "refit_from_file", 1),
]
"""Class, method, and how many arguments it is given."""

RTX_ONLY = {each[:2] for each in CALLED if each[0] in RTX_CLASSES} | {
    ("Runtime", "get_engine_validity"),
    ("ICudaEngine", "create_runtime_config"),
}


@pytest.mark.parametrize(("owner", "method", "count"), CALLED)
def test_methods_of_tensorrt_rtx_take_as_many_arguments_as_they_are_given(owner: str, method: str, count: int):
    real = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    text = re.sub(r"<[^>]*>", "", getattr(getattr(real, owner), method).__doc__)  # defaults
    counts = {len(re.findall(r"\w+: ", given)) for given in re.findall(rf"{method}\(self: [\w.]+,? ?(.*)\) ->", text)}
    assert count in counts, text


@pytest.mark.parametrize(("owner", "method", "count"), [each for each in CALLED if each[:2] not in RTX_ONLY])
def test_methods_of_tensorrt_take_as_many_arguments_as_they_are_given(owner: str, method: str, count: int):
    stubs = json.loads(STUBS.read_text())["classes"]
    assert f"{owner}.{method}" not in REMOVED_IN_11
    assert any(each["required"] <= count <= len(each["parameters"]) for each in stubs[owner][method])
