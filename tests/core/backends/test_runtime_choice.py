from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.backends.cases import ON_HOST
from core.backends.fake_tensorrt import fake_module
from core.backends.host_device import HostDevice
from core.backends.native_host import write_engine

from vpdeploy import backends, load
from vpdeploy.backends import AUTO, RUNTIMES, Runtime, open_backend
from vpdeploy.backends.native import backend as native
from vpdeploy.engines.store import FoundEngine
from vpdeploy.engines.toolkit import TOOLKITS, Toolkit
from vpdeploy.errors import BackendError, BundleCorruptError, EngineIncompatibleError, SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.machine import Gpu

L4 = Gpu(name="NVIDIA L4", sm="sm_89", memory_bytes=24 << 30, cuda_version="13.0")


class Opened:
    """A backend that only knows why it was opened."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Obstacles by runtime, which the test sets: text, None, or an error that opening raises."""
    states: dict[str, Any] = dict.fromkeys(RUNTIMES)

    def made(name: str, automatic: bool) -> Runtime:
        def open_one(artifact: Artifact, threads: int | None, reason: str) -> Any:
            if isinstance(states[name], Exception):
                raise states[name]
            return Opened(name, reason)

        def obstacle(artifact: Artifact) -> str | None:
            return states[name] if isinstance(states[name], str) else None

        return Runtime(obstacle=obstacle, open=open_one, automatic=automatic)

    monkeypatch.setattr(backends, "RUNTIMES", {name: made(name, each.automatic) for name, each in RUNTIMES.items()})
    return states


def opened(artifact: Artifact, runtime: str = AUTO) -> Any:
    return open_backend(artifact, runtime=runtime)


def test_auto_tries_the_fastest_first_and_never_one_that_builds_when_it_starts(
    artifact: Artifact, runtimes: dict[str, Any]
):
    order = []
    for _ in range(4):
        found = opened(artifact)
        order.append(found.name)
        runtimes[found.name] = "blocked"
    assert order == ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu"]
    with pytest.raises(BackendError, match=r"no runtime works here: tensorrt, tensorrt-rtx, .*: blocked"):
        opened(artifact)


def test_auto_names_each_faster_runtimes_obstacle_once(artifact: Artifact, runtimes: dict[str, Any]):
    runtimes |= {"tensorrt": "no NVIDIA driver", "tensorrt-rtx": "no engine", "onnxruntime-cuda": "no NVIDIA driver"}
    assert opened(artifact).reason == (
        "tensorrt, onnxruntime-cuda: no NVIDIA driver; tensorrt-rtx: no engine; fastest that works here"
    )


def test_auto_goes_on_where_a_faster_runtime_refuses_its_engine_and_says_so(
    artifact: Artifact, runtimes: dict[str, Any]
):
    runtimes["tensorrt"] = EngineIncompatibleError("k.engine: refused; run: vpdeploy build")
    runtimes["tensorrt-rtx"] = BackendError("out of GPU memory")
    found = opened(artifact)
    assert found.name == "onnxruntime-cuda"
    assert found.reason.startswith("tensorrt: k.engine: refused; run: vpdeploy build; tensorrt-rtx: out of GPU memory;")


def test_auto_does_not_pass_over_a_tampered_engine(artifact: Artifact, runtimes: dict[str, Any]):
    runtimes["tensorrt"] = BundleCorruptError("k.engine: contents do not match")
    with pytest.raises(BundleCorruptError):
        opened(artifact)


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_what_was_asked_for_is_never_replaced(artifact: Artifact, runtimes: dict[str, Any], name: str):
    assert (opened(artifact, name).name, opened(artifact, name).reason) == (name, "asked for")
    runtimes[name] = "blocked"
    with pytest.raises(BackendError, match=f"^runtime '{name}' does not work here: blocked$"):
        opened(artifact, name)


def test_an_unknown_runtime_is_refused_with_all_known_ones(artifact: Artifact):
    with pytest.raises(SpecError, match=f"unknown runtime 'trt'; choose one of: auto, {', '.join(RUNTIMES)}"):
        opened(artifact, "trt")


def test_every_toolkit_is_a_runtime_that_the_tests_of_every_backend_run():
    assert set(TOOLKITS) <= set(RUNTIMES)
    assert {f"host {name}" for name in TOOLKITS} == set(ON_HOST)


# --- obstacles of the native runner ---


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(native, "find_gpu", lambda: L4)
    monkeypatch.setattr("vpdeploy.engines.store.find_gpu", lambda: L4)
    return monkeypatch


@pytest.mark.parametrize("name", list(TOOLKITS))
def test_without_a_gpu_no_engine_is_looked_for(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(native, "find_gpu", lambda: None)
    monkeypatch.setattr(native, "gpu_obstacle", lambda: "no NVIDIA driver")
    monkeypatch.setattr(native, "engine_obstacle", lambda *_: pytest.fail("an engine was looked for"))
    assert native.native_obstacle(artifact, name) == "no NVIDIA driver"
    with pytest.raises(BackendError, match=f"runtime '{name}' does not work here: no NVIDIA driver"):
        opened(artifact, name)


def test_where_no_engine_was_built_the_command_is_named(artifact: Artifact, with_gpu: pytest.MonkeyPatch):
    pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    obstacle = str(native.native_obstacle(artifact, "tensorrt-rtx"))
    assert obstacle.endswith(f"vpdeploy build {artifact.path} --runtime tensorrt-rtx")


@pytest.fixture
def loadable(artifact: Artifact, with_gpu: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Artifact, FoundEngine]:
    """A bundle with an engine that the host's device and TensorRT-RTX's fake run."""
    copied = Artifact.open(Path(shutil.copytree(artifact.path, tmp_path / "zoo")))
    found = write_engine(copied, copied.engines_folder, runtime="tensorrt-rtx")
    found.path.with_suffix(".json").write_text(json.dumps(found.card.to_fields()))
    device = HostDevice()
    module, _ = fake_module("tensorrt-rtx", device)
    toolkit = Toolkit("tensorrt-rtx", module)
    for place in ("vpdeploy.engines.store.load_toolkit", "vpdeploy.backends.native.backend.load_toolkit"):
        with_gpu.setattr(place, lambda name: toolkit)
    with_gpu.setattr("vpdeploy.engines.store.is_installed", lambda name: name == "tensorrt-rtx")
    with_gpu.setattr(native, "has_bindings", lambda: True)
    with_gpu.setattr(native, "CudaDevice", lambda extra: device)
    return copied, found


def test_auto_takes_an_engine_that_fits_this_gpu(loadable: tuple[Artifact, FoundEngine]):
    with load(loadable[0].path) as session:
        described = session.describe().runtime
        answers = session.predict(np.zeros((3, 32, 32, 3), np.uint8), session.tasks[0])
    assert len(answers) == 3
    assert described.name == "tensorrt-rtx"
    assert described.reason == (
        "tensorrt: 'tensorrt' is not installed: pip install 'vpdeploy[tensorrt]'; fastest that works here"
    )
    assert described.engine.gpu == "NVIDIA L4 (sm_89)"
    assert described.engine.file == loadable[1].path.name


@pytest.mark.parametrize("runtime", ["auto", "tensorrt-rtx"])
def test_a_tampered_engine_is_never_loaded(loadable: tuple[Artifact, FoundEngine], runtime: str):
    artifact, found = loadable
    data = bytearray(found.path.read_bytes())
    data[len(data) // 2] ^= 1
    found.path.write_bytes(bytes(data))
    with pytest.raises(BundleCorruptError, match="contents do not match its sidecar's sha256"):
        opened(artifact, runtime)


def test_an_engine_that_is_too_small_for_the_tasks_is_passed_over_with_the_command(
    loadable: tuple[Artifact, FoundEngine], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(native, "present_sizes", lambda graph: {"prefix": 80, "classes": 2, "slots": 1})
    obstacle = str(native.native_obstacle(loadable[0], "tensorrt-rtx"))
    assert "is too small for the bundle's tasks: prefix 80 is outside 1:16:64" in obstacle
    assert obstacle.endswith(f"run: vpdeploy build {loadable[0].path} --runtime tensorrt-rtx")


def test_missing_bindings_are_an_obstacle(artifact: Artifact, with_gpu: pytest.MonkeyPatch):
    with_gpu.setattr(native, "engine_obstacle", lambda *_: None)
    with_gpu.setattr(native, "has_bindings", lambda: False)
    expected = "'cuda.bindings' is not installed: pip install 'vpdeploy[tensorrt]'"
    assert native.native_obstacle(artifact, "tensorrt") == expected
