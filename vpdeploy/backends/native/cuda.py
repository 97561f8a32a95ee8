"""The GPU behind ``Device``: every call into ``cuda.bindings`` is in this file."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

import numpy as np

from vpdeploy.backends.native.device import OUT_OF_MEMORY, FreeMemory, Pinned, cuda_fault, memory_fault
from vpdeploy.errors import MissingExtraError

CALLS: dict[str, int] = {
    "cudaSetDevice": 1,
    "cudaMemGetInfo": 0,
    "cudaMalloc": 1,
    "cudaFree": 1,
    "cudaHostAlloc": 2,
    "cudaFreeHost": 1,
    "cudaStreamCreateWithFlags": 1,
    "cudaStreamDestroy": 1,
    "cudaStreamSynchronize": 1,
    "cudaMemcpyAsync": 5,
    "cudaStreamBeginCapture": 2,
    "cudaStreamEndCapture": 1,
    "cudaGraphInstantiate": 2,
    "cudaGraphLaunch": 2,
    "cudaGraphDestroy": 1,
    "cudaGraphExecDestroy": 1,
}
"""The CUDA runtime's functions that this file calls, and how many arguments each takes."""


class CudaDevice:
    """The first visible GPU; see ``Device``.

    Args:
        extra: The extra of vpdeploy that brings ``cuda.bindings`` for the runtime that is opened.

    Raises:
        MissingExtraError: ``cuda.bindings`` is not installed.
        BackendError: There is no GPU, or no driver that is new enough.
    """

    def __init__(self, extra: str) -> None:
        if not has_bindings():
            raise MissingExtraError("cuda.bindings", extra)
        from cuda.bindings import runtime

        self._cuda: Any = runtime
        self.activate()

    def activate(self) -> None:
        """See ``Device.activate``."""
        self._call("cudaSetDevice", 0)

    def memory(self) -> FreeMemory:
        """See ``Device.memory``."""
        free, total = self._call("cudaMemGetInfo")
        return FreeMemory(free_bytes=int(free), total_bytes=int(total))

    def allocate(self, size: int, purpose: str) -> int:
        """See ``Device.allocate``."""
        code, address = self._cuda.cudaMalloc(size)
        if code.name == OUT_OF_MEMORY:
            raise memory_fault(purpose, size, self.memory().free_bytes)
        self._check("cudaMalloc", code)
        return int(address)

    def free(self, address: int) -> None:
        """See ``Device.free``."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> Pinned:
        """See ``Device.allocate_pinned``."""
        (address,) = self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault)
        memory = (ctypes.c_uint8 * size).from_address(int(address))
        return Pinned(address=int(address), data=np.ctypeslib.as_array(memory))

    def free_pinned(self, pinned: Pinned) -> None:
        """See ``Device.free_pinned``."""
        self._call("cudaFreeHost", pinned.address)

    def create_stream(self) -> int:
        """See ``Device.create_stream``."""
        # Non-blocking: TensorRT warns of the default stream's synchronisation with every other one.
        (stream,) = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        return int(stream)

    def destroy_stream(self, stream: int) -> None:
        """See ``Device.destroy_stream``."""
        self._call("cudaStreamDestroy", stream)

    def copy_in(self, target: int, source: int, size: int, stream: int) -> None:
        """See ``Device.copy_in``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def copy_out(self, target: int, source: int, size: int, stream: int) -> None:
        """See ``Device.copy_out``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def synchronize(self, stream: int) -> None:
        """See ``Device.synchronize``."""
        self._call("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """See ``Device.begin_capture``."""
        # Of this thread alone: others go on allocating and copying meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """See ``Device.end_capture``."""
        (graph,) = self._call("cudaStreamEndCapture", stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        """See ``Device.launch``."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """See ``Device.destroy_graph``."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the CUDA runtime and return what it returns besides its error code."""
        code, *results = getattr(self._cuda, name)(*arguments)
        self._check(name, code)
        return tuple(results)

    def _check(self, name: str, code: Any) -> None:
        if int(code) == 0:
            return
        # The runtime also remembers a failure that it returned; a later call would report it once more.
        self._cuda.cudaGetLastError()
        _, text = self._cuda.cudaGetErrorString(code)
        raise cuda_fault(name, code.name, text.decode(errors="replace"))


def has_bindings() -> bool:
    """Tell whether ``cuda.bindings`` is installed, without importing it."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # no package "cuda" at all
        return False


def copy_to_device(target: int, source: int, size: int) -> None:
    """Copy ``size`` bytes of the host to the device and wait; for memory that another runtime owns.

    Raises:
        BackendError: The copy failed.
    """
    device = CudaDevice("rtx")
    stream = device.create_stream()
    try:
        device.copy_in(target, source, size, stream)
        device.synchronize(stream)
    finally:
        device.destroy_stream(stream)
