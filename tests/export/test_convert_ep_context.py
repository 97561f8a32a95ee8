"""EPContext models: without a GPU only the refusals and what ONNX Runtime is asked for can be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest

from vpdeploy.backends.providers import PROVIDERS, _register
from vpdeploy.errors import BackendError, BuildError, SpecError
from vpdeploy.machine import gpu_obstacle
from vpdeploy_export.conversion import convert as convert_bundle
from vpdeploy_export.targets import ep_context
from vpdeploy_export.targets.ep_context import PROFILE_PREFIXES, compile_model, profile_options, session_options
from vpdeploy_export.targets.target import TargetOptions


def convert(zoo: Path, out: Path, **options: Any) -> Path:
    return convert_bundle(zoo, out, target="ep-context", options=TargetOptions(**options)).path


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROFILE_PREFIXES:
        monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS[name], obstacle=lambda graph: None))


class RecordedCompiler:
    """Stands for ``onnxruntime.ModelCompiler``; writes an EPContext model, or the source itself."""

    calls: list[dict[str, Any]]
    operators: tuple[str, ...]

    def __init__(self, settings: Any, source: str, **options: Any) -> None:
        assert isinstance(settings, onnxruntime.SessionOptions)
        self.source = ir.load(source)
        type(self).calls.append({"inputs": [value.name for value in self.source.graph.inputs], **options})

    def compile_to_file(self, out: str) -> None:
        inputs, outputs = (
            [ir.val(v.name, v.dtype, v.shape) for v in self.source.graph.inputs],
            self.source.graph.outputs,
        )
        nodes = [ir.Node("com.microsoft", name, inputs, num_outputs=1) for name in self.operators]
        last = nodes[-1].outputs[0]
        last.name, last.type, last.shape = "logits", outputs[0].type, outputs[0].shape
        graph = ir.Graph(inputs, [last], nodes=nodes, opset_imports={"": 20, "com.microsoft": 1}, name="g")
        ir.save(ir.Model(graph, ir_version=10), out)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> type[RecordedCompiler]:
    RecordedCompiler.calls, RecordedCompiler.operators = [], ("EPContext",)
    monkeypatch.setattr(onnxruntime, "ModelCompiler", RecordedCompiler)
    return RecordedCompiler


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDAExecutionProvider", "tensorrt"])
def test_providers_without_context_models_are_refused(zoo: Path, tmp_path: Path, with_gpu: None, provider: str):
    with pytest.raises(SpecError, match=f"--provider '{provider}': it has no EPContext models; choose one of Tensorrt"):
        convert(zoo, tmp_path / "out", provider=provider)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(gpu_obstacle() is None, reason="there is a GPU")
@pytest.mark.parametrize("provider", [None, *PROFILE_PREFIXES])
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(zoo: Path, tmp_path: Path, provider: str | None):
    with pytest.raises(
        BackendError, match="compiles for the GPU that is here, and does not work here: no NVIDIA driver"
    ) as raised:
        convert(zoo, tmp_path / "out", provider=provider)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("provider", [*PROFILE_PREFIXES])
def test_a_provider_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch, provider: str):
    class Settings:
        def add_provider(self, name: str, options: dict[str, str]) -> None:
            raise RuntimeError("libnvinfer.so.10:\nno such file")

    monkeypatch.setattr(onnxruntime, "SessionOptions", Settings)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider])
    with pytest.raises(BackendError, match=r"cannot be started: libnvinfer\.so\.10: no such file; nothing was written"):
        session_options(provider, {})


def test_an_impossible_batch_is_refused(zoo: Path, tmp_path: Path, with_gpu: None):
    with pytest.raises(SpecError, match="--max-batch 0: should be at least 1"):
        convert(zoo, tmp_path / "out", max_batch=0)


@pytest.mark.parametrize(
    ("provider", "prefix"), [("TensorrtExecutionProvider", "trt"), ("NvTensorRTRTXExecutionProvider", "nv")]
)
def test_the_profile_covers_batches_from_one_to_the_largest(provider: str, prefix: str):
    assert profile_options(provider, image_size=224, max_batch=16) == {
        f"{prefix}_profile_min_shapes": "image:1x224x224x3,slot:1",
        f"{prefix}_profile_opt_shapes": "image:16x224x224x3,slot:16",
        f"{prefix}_profile_max_shapes": "image:16x224x224x3,slot:16",
    }


def test_a_built_in_provider_gets_the_options(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Settings:
        def add_provider(self, name: str, options: dict[str, str]) -> None:
            asked.append((name, options))

    monkeypatch.setattr(onnxruntime, "SessionOptions", Settings)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    assert isinstance(session_options("TensorrtExecutionProvider", {"a": "b"}), Settings)
    assert asked == [("TensorrtExecutionProvider", {"a": "b"})]


def test_a_plug_in_is_registered_and_its_devices_get_the_options(monkeypatch: pytest.MonkeyPatch):
    """The calls are those of NVIDIA's integration guide for the plug-in."""
    asked: list[Any] = []

    class Device:
        ep_name = "NvTensorRTRTXExecutionProvider"

    class Plugin:
        get_ep_name = staticmethod(lambda: "NvTensorRTRTXExecutionProvider")
        get_library_path = staticmethod(lambda: "/lib/nv.so")

    class Settings:
        def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
            asked.append((devices, options))

    registered: list[Device] = []
    _register.cache_clear()

    def register(name: str, path: str) -> None:
        asked.append((name, path))
        registered.append(Device())

    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_nv_tensorrt_rtx", Plugin)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Settings)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: list(registered))
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    session_options("NvTensorRTRTXExecutionProvider", {"nv_profile_min_shapes": "x"})
    session_options("NvTensorRTRTXExecutionProvider", {})
    assert asked == [
        ("NvTensorRTRTXExecutionProvider", "/lib/nv.so"),
        (registered, {"nv_profile_min_shapes": "x"}),
        (registered, {}),
    ]


def test_the_compiler_is_given_the_graph_with_its_table_inside(
    zoo: Path, tmp_path: Path, with_gpu: None, compiler: type[RecordedCompiler], monkeypatch: pytest.MonkeyPatch
):
    settings = onnxruntime.SessionOptions()
    asked: list[Any] = []

    def recorded(provider: str, options: dict[str, str]) -> Any:
        asked.append((provider, options))
        return settings

    monkeypatch.setattr(ep_context, "session_options", recorded)
    with pytest.raises(BackendError, match="ONNX Runtime cannot load it"):  # there is nothing here that runs it
        convert(zoo, tmp_path / "out", max_batch=4)
    (call,) = compiler.calls
    assert call["inputs"] == ["image", "slot"]
    assert call["embed_compiled_data_into_model"] is False
    assert call["flags"] == onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
    assert asked[0] == (
        "TensorrtExecutionProvider",
        profile_options("TensorrtExecutionProvider", image_size=32, max_batch=4),
    )
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_is_only_partly_compiled_is_refused(
    folded_flowers: Path, tmp_path: Path, compiler: type[RecordedCompiler]
):
    compiler.operators = ("Gelu", "EPContext")
    with pytest.raises(BuildError, match=r"left operators to others \(Gelu\), expected one EPContext node"):
        compile_model(folded_flowers, tmp_path / "model.onnx", onnxruntime.SessionOptions())


def test_the_real_compiler_refuses_a_graph_that_no_provider_takes(folded_flowers: Path, tmp_path: Path):
    """The CPU provider compiles nothing: the flag that is passed makes ONNX Runtime say so."""
    with pytest.raises(BuildError, match=r"the graph cannot be compiled: .*; nothing was written") as raised:
        compile_model(folded_flowers, tmp_path / "model.onnx", onnxruntime.SessionOptions())
    assert "\n" not in str(raised.value)
