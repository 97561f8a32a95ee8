from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from core.backends.tables import prompt_set, table

from vpdeploy.backends import ort, providers
from vpdeploy.engines.profile import Profile, present_sizes
from vpdeploy.errors import BackendError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.layout import IMAGE, LOGITS


def fake_ort(*available: str, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(get_available_providers=lambda: list(available), **more)


def of_precision(artifact: Artifact, precision: Precision) -> Artifact:
    return replace(artifact, graph=replace(artifact.graph, precision=precision))


# --- obstacles ---


@pytest.mark.parametrize("name", [providers.CUDA_PROVIDER, providers.TENSORRT_PROVIDER, providers.RTX_PROVIDER])
def test_without_a_driver_nothing_else_is_asked(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(providers, "gpu_obstacle", lambda: "no NVIDIA driver")
    monkeypatch.setattr(providers, "onnxruntime", lambda: pytest.fail("ONNX Runtime was imported"))
    assert providers.PROVIDERS[name].obstacle(artifact) == "no NVIDIA driver"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (providers.CUDA_PROVIDER, "the installed onnxruntime has no CUDA provider (install onnxruntime-gpu)"),
        (providers.TENSORRT_PROVIDER, "the installed onnxruntime has no TensorRT provider (install onnxruntime-gpu)"),
        (providers.RTX_PROVIDER, "the installed onnxruntime has no TensorRT-RTX provider (pip uninstall"),
    ],
)
def test_a_build_of_onnxruntime_without_the_provider_is_named_with_the_one_that_has_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str, message: str
):
    monkeypatch.setattr(providers, "gpu_obstacle", lambda: None)
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake_ort("CPUExecutionProvider"))
    assert str(providers.PROVIDERS[name].obstacle(artifact)).startswith(message)


def test_tensorrts_missing_library_is_named(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(providers, "gpu_obstacle", lambda: None)
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake_ort(providers.TENSORRT_PROVIDER))
    monkeypatch.setattr(providers, "_NVINFER", "libnvinfer.so.absent")
    obstacle = providers.PROVIDERS[providers.TENSORRT_PROVIDER].obstacle(artifact)
    assert obstacle == (
        "libnvinfer.so.absent is missing (install TensorRT 10; with TensorRT 11 use --runtime tensorrt)"
    )


def test_the_plug_in_beside_onnxruntime_gpu_is_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(providers, "gpu_obstacle", lambda: None)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake_ort(providers.CUDA_PROVIDER))
    assert "here is onnxruntime-gpu" in str(providers.PROVIDERS[providers.RTX_PROVIDER].obstacle(artifact))
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake_ort("CPUExecutionProvider"))
    assert providers.PROVIDERS[providers.RTX_PROVIDER].obstacle(artifact) is None


def test_bfloat16_has_no_kernels_on_the_cpu(artifact: Artifact):
    obstacle = providers.PROVIDERS[providers.CPU_PROVIDER].obstacle
    assert obstacle(artifact) is None
    assert "no bfloat16 kernels" in str(obstacle(of_precision(artifact, "bf16")))


# --- options ---


def shapes(options: dict[str, str], key: str) -> dict[str, tuple[int, ...]]:
    parts = dict(each.split(":") for each in options[key].split(","))
    return {name: tuple(map(int, sizes.split("x"))) for name, sizes in parts.items()}


@pytest.mark.parametrize(
    ("options_of", "prefix"), [(providers.tensorrt_options, "trt"), (providers.rtx_options, "nv")], ids=["trt", "nv"]
)
def test_every_input_has_an_explicit_profile_that_is_the_one_engines_are_built_with(
    artifact: Artifact, options_of: Callable[[Artifact], dict[str, str]], prefix: str
):
    options = options_of(artifact)
    low, tuned, high = (shapes(options, f"{prefix}_profile_{bound}_shapes") for bound in ("min", "opt", "max"))
    assert artifact.layout is not None
    assert set(low) == {"image", "slot", *(spec.name for spec in artifact.layout.tensors)}
    profile = Profile().completed(artifact, present_sizes(artifact))
    assert (low["image"], high["image"]) == ((1, 32, 32, 3), (profile["batch"].largest, 32, 32, 3))
    assert low["slot"] == (1,)
    for index, bound in enumerate((low, tuned, high)):
        slots, prefix_length, classes = (profile[axis][index] for axis in ("slots", "prefix", "classes"))
        assert bound["prefix_key"] == (slots, 3, 3, prefix_length, 16)
        assert bound["head_bias"] == (slots, classes)
    for name in low:
        assert all(a <= b <= c for a, b, c in zip(low[name], tuned[name], high[name], strict=True))


def test_caches_lie_beside_the_graph_in_a_folder_of_its_own(artifact: Artifact):
    folder = str(artifact.engines_folder / f"onnxruntime-{artifact.sha256[:12]}")
    options = providers.tensorrt_options(artifact)
    assert (options["trt_engine_cache_path"], options["trt_timing_cache_path"]) == (folder, folder)
    assert (options["trt_engine_cache_enable"], options["trt_timing_cache_enable"]) == ("1", "1")
    assert Path(folder).is_dir()
    assert providers.rtx_options(artifact)["nv_runtime_cache_path"] == folder
    assert not any("fp16" in option for option in options)  # the graph carries its types


def test_a_folder_that_cannot_be_made_is_one_line(artifact: Artifact, tmp_path: Path):
    graph_in_a_file = replace(artifact, graph_path=tmp_path / "file" / "model.onnx")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        BackendError, match=r"cannot be made for the engines that ONNX Runtime builds \(Not a directory\)"
    ):
        providers.tensorrt_options(graph_in_a_file)


# --- the plug-in ---


def test_a_plug_in_is_registered_once_and_its_first_device_is_taken(monkeypatch: pytest.MonkeyPatch):
    registered: list[tuple[str, str]] = []
    devices = [SimpleNamespace(ep_name=name) for name in ("other", "nv_test", "nv_test")]
    monkeypatch.setitem(
        sys.modules,
        "rtx_plugin",
        SimpleNamespace(get_ep_name=lambda: "nv_test", get_library_path=lambda: "/lib/x.so"),  # type: ignore[arg-type]
    )
    module = fake_ort(
        register_execution_provider_library=lambda *given: registered.append(given), get_ep_devices=lambda: devices
    )
    monkeypatch.setattr(providers, "onnxruntime", lambda: module)
    for _ in range(2):
        assert providers.plugin_devices("rtx_plugin") == devices[1:2]
    assert registered == [("nv_test", "/lib/x.so")]
    devices[:] = devices[:1]
    with pytest.raises(BackendError, match="rtx_plugin finds no GPU that it works on"):
        providers.plugin_devices("rtx_plugin")


def test_a_plug_in_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: str) -> None:
        raise RuntimeError("cannot open\nlibx.so")

    plugin = SimpleNamespace(get_ep_name=lambda: "nv_test", get_library_path=lambda: "/lib/x.so")
    monkeypatch.setitem(sys.modules, "bad_plugin", plugin)  # type: ignore[arg-type]
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake_ort(register_execution_provider_library=refuse))
    with pytest.raises(BackendError, match=r"bad_plugin: its library cannot be loaded: cannot open libx\.so"):
        providers.plugin_devices("bad_plugin")


# --- a table on a device ---


class Value:
    """A tensor of ONNX Runtime on a device that is a copy in the host's memory."""

    def __init__(self, array: Any) -> None:
        self.array = array.copy()
        self.whole_updates = 0

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def update_inplace(self, array: Any) -> None:
        self.whole_updates += 1
        self.array[...] = array


@pytest.mark.parametrize("has_bindings", [True, False])
def test_a_slot_of_a_table_on_the_device_is_updated_by_its_bytes_where_that_is_possible(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, has_bindings: bool
):
    import ctypes

    held = table(artifact, 4)
    values = {name: Value(array) for name, array in held.arrays.items()}
    moved: list[int] = []

    def copy(target: int, source: int, size: int) -> None:
        moved.append(size)
        ctypes.memmove(target, source, size)

    monkeypatch.setattr(ort, "copy_to_device", copy)
    monkeypatch.setattr(ort, "has_bindings", lambda: has_bindings)
    backend = ort.OrtBackend(artifact.graph_path, provider=ort.CPU_PROVIDER, threads=1, reason="a test")
    backend._provider = providers.PROVIDERS[providers.CUDA_PROVIDER]
    backend._table, backend._table_values = held, values  # type: ignore[assignment]
    held.write(2, prompt_set(artifact, 60))
    backend.refresh_slot(2)
    for name, value in values.items():
        np.testing.assert_array_equal(value.array, held.arrays[name])
        assert value.whole_updates == (0 if has_bindings else 1)
    assert sum(moved) == (held.slot_bytes if has_bindings else 0)


# --- what is said ---


def test_float16_on_the_cpu_says_that_it_runs_through_casts(artifact: Artifact):
    notes = []
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    for precision in precisions:
        backend = ort.open_ort(of_precision(artifact, precision), ort.CPU_PROVIDER, 1, "asked for")
        notes.append(backend.describe().note)
        backend.close()
    assert notes[0] is None
    assert "float16 runs through casts" in str(notes[1])


def test_a_graph_that_vpdeploy_did_not_write_is_refused(tmp_path: Any):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", kinds[:1], kinds[1:]), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(BackendError, match=f"not written by vpdeploy export, no '{IMAGE}' input or '{LOGITS}' output"):
        ort.OrtBackend(tmp_path / "other.onnx", provider=ort.CPU_PROVIDER, threads=1, reason="a test")
