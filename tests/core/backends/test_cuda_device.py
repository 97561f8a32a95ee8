from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

from vpdeploy.backends.native import cuda
from vpdeploy.backends.native.cuda import CALLS, CudaDevice
from vpdeploy.backends.native.device import _ADVICE, Device, Pinned
from vpdeploy.errors import BackendError, MissingExtraError
from vpdeploy.machine import gpu_obstacle

runtime: Any = pytest.importorskip("cuda.bindings.runtime", reason="needs the rtx extra")


@pytest.fixture
def device() -> CudaDevice:
    if obstacle := gpu_obstacle():
        pytest.skip(obstacle)
    return CudaDevice("rtx")


def test_every_function_that_is_called_exists_with_as_many_arguments():
    for name, count in CALLS.items():
        signature = re.match(r"(\w+)\((.*)\)", getattr(runtime, name).__doc__.strip().splitlines()[0])
        assert signature is not None
        assert signature[1] == name
        arguments = [each for each in signature[2].split(",") if each.strip()]
        assert len(arguments) == count, f"{name}: {signature[2]}"


def test_every_function_that_the_source_names_is_in_the_list_of_calls():
    named = set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(cuda)))
    direct = set(re.findall(r"self\._cuda\.(cuda[A-Z]\w+)\(", inspect.getsource(cuda)))
    assert named == set(CALLS)
    assert direct <= {*CALLS, "cudaGetLastError", "cudaGetErrorString"}
    for name in re.findall(r"self\._cuda\.(cuda\w+(?:\.\w+)?)", inspect.getsource(cuda)):
        owner, _, member = name.partition(".")
        assert hasattr(runtime, owner), name
        assert not member or hasattr(getattr(runtime, owner), member), name


def test_every_error_with_advice_is_an_error_of_the_runtime():
    assert set(_ADVICE) <= set(runtime.cudaError_t.__members__)


def test_the_device_has_every_method_of_the_protocol_with_the_same_arguments():
    methods = {name: each for name, each in vars(Device).items() if inspect.isfunction(each) and name[0] != "_"}
    assert methods
    for name, method in methods.items():
        assert inspect.signature(method) == inspect.signature(getattr(CudaDevice, name)), name


@pytest.mark.skipif(gpu_obstacle() is None, reason="a GPU is here")
def test_without_a_gpu_it_says_in_one_line_what_to_do():
    with pytest.raises(BackendError, match=r"cudaSetDevice failed with cudaError\w+ \(.*\): no NVIDIA .*") as caught:
        CudaDevice("rtx")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(gpu_obstacle() is None, reason="a GPU is here")
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("memory", ()),
        ("allocate", (256, "a test")),
        ("free", (4096,)),
        ("allocate_pinned", (256,)),
        ("free_pinned", (Pinned(address=4096, data=np.zeros(1, np.uint8)),)),
        ("create_stream", ()),
        ("destroy_stream", (4096,)),
        ("copy_in", (4096, 8192, 16, 4096)),
        ("copy_out", (4096, 8192, 16, 4096)),
        ("synchronize", (4096,)),
        ("begin_capture", (4096,)),
        ("end_capture", (4096,)),
        ("launch", (4096, 4096)),
        ("destroy_graph", (4096,)),
    ],
)
def test_every_real_call_takes_integers_and_its_failure_is_one_of_ours(method: str, arguments: tuple[Any, ...]):
    device = object.__new__(CudaDevice)
    device._cuda = runtime
    with pytest.raises(BackendError, match=r"^cuda\w+ failed with cudaError\w+ \(.+\): "):
        getattr(device, method)(*arguments)


def test_streams_and_graphs_of_the_runtime_are_integers():
    for kind in (runtime.cudaStream_t, runtime.cudaGraphExec_t):
        assert int(kind(4096)) == 4096


class Calls:
    """The CUDA runtime, answering what a test wants."""

    def __init__(self, **codes: str) -> None:
        self._codes = codes

    def __getattr__(self, name: str) -> Any:
        if name in CALLS or name in ("cudaGetLastError", "cudaGetErrorString"):
            return lambda *arguments: self._answer(name, arguments)
        return getattr(runtime, name)

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "cudaGetErrorString":
            return runtime.cudaGetErrorString(*arguments)
        code = getattr(runtime.cudaError_t, self._codes.get(name, "cudaSuccess"))
        return (code, 100, 200) if name == "cudaMemGetInfo" else (code, 4096)


def answering(**codes: str) -> CudaDevice:
    device = object.__new__(CudaDevice)
    device._cuda = Calls(**codes)
    return device


def test_out_of_memory_names_what_is_needed_and_what_is_free():
    device = answering(cudaMalloc="cudaErrorMemoryAllocation")
    with pytest.raises(
        BackendError, match="out of GPU memory: a table of 9 slots needs 512 bytes, 100 are free; choose"
    ):
        device.allocate(512, "a table of 9 slots")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("cudaErrorIllegalAddress", "restart the process"),
        ("cudaErrorInsufficientDriver", "update the driver"),
        ("cudaErrorNoDevice", "check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("cudaErrorDevicesUnavailable", "another process holds the GPU"),
        ("cudaErrorNoKernelImageForDevice", "build it again"),
        ("cudaErrorTextureFetchFailed", "restart the process, and report this line"),
    ],
)
def test_an_error_code_says_its_name_and_what_to_do(code: str, advice: str):
    device = answering(cudaStreamSynchronize=code)
    with pytest.raises(BackendError, match=rf"cudaStreamSynchronize failed with {code} \(.+\): .*{advice}"):
        device.synchronize(1)


def test_a_graph_that_cannot_be_made_executable_is_destroyed():
    device = answering(cudaGraphInstantiate="cudaErrorInvalidValue")
    with pytest.raises(BackendError, match="cudaGraphInstantiate failed with cudaErrorInvalidValue"):
        device.end_capture(1)


def test_without_the_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "has_bindings", lambda: False)
    with pytest.raises(MissingExtraError, match=r"'cuda.bindings' is not installed: pip install 'vpdeploy\[rtx\]'"):
        CudaDevice("rtx")


# --- on a GPU ---


@pytest.mark.gpu
def test_bytes_return_from_the_device_as_they_went(device: CudaDevice):
    pinned, stream = device.allocate_pinned(4096), device.create_stream()
    address = device.allocate(4096, "a test")
    pinned.data[:] = np.arange(4096, dtype=np.uint16).view(np.uint8)[:4096]
    expected = pinned.data.copy()
    device.copy_in(address, pinned.address, 4096, stream)
    device.synchronize(stream)
    pinned.data[:] = 0
    device.copy_out(pinned.address, address, 4096, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(pinned.data, expected)
    assert address % 256 == 0
    device.free(address)
    device.free_pinned(pinned)
    device.destroy_stream(stream)


@pytest.mark.gpu
def test_a_captured_copy_is_done_when_it_is_launched_and_reads_what_is_there_then(device: CudaDevice):
    pinned, stream = device.allocate_pinned(512), device.create_stream()
    address = device.allocate(256, "a test")
    pinned.data[:] = 1
    device.begin_capture(stream)
    device.copy_in(address, pinned.address, 256, stream)
    device.copy_out(pinned.address + 256, address, 256, stream)
    graph = device.end_capture(stream)
    for value in (7, 9):
        pinned.data[:256] = value
        device.launch(graph, stream)
        device.synchronize(stream)
        assert (pinned.data[256:] == value).all()
    device.destroy_graph(graph)
    device.free(address)
    device.free_pinned(pinned)
    device.destroy_stream(stream)


@pytest.mark.gpu
def test_more_memory_than_there_is_names_what_is_free(device: CudaDevice):
    with pytest.raises(BackendError, match=r"out of GPU memory: a test needs \d+ bytes, \d+ are free"):
        device.allocate(1 << 50, "a test")
    assert device.memory().free_bytes <= device.memory().total_bytes
