"""What the native runner needs of a GPU, memory, streams and captured graphs, and what it says when one of them fails.

``CudaDevice`` is the real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vpdeploy.errors import BackendError

ALIGNMENT = 256
"""Every tensor begins at a multiple of this many bytes, as ``cudaMalloc`` and TensorRT have it."""


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """Page-locked host memory: the GPU copies from and to it while the host does something else.

    Attributes:
        address: The address of its first byte.
        data: The same bytes as an array, uint8 [size].
    """

    address: int
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """How much memory the GPU has, of all processes together.

    Attributes:
        free_bytes: Bytes that no process has allocated.
        total_bytes: Bytes that the GPU has in all.
    """

    free_bytes: int
    total_bytes: int


class Device(Protocol):
    """One GPU. Addresses, streams and graphs are integers that only the device understands.

    Every method raises BackendError, in one line that says what to do.
    """

    def activate(self) -> None:
        """Make this the calling thread's device."""
        ...

    def memory(self) -> FreeMemory:
        """Return how much memory is free."""
        ...

    def allocate(self, size: int, purpose: str) -> int:
        """Return the address of ``size`` bytes on the device; ``purpose`` names them where memory is short."""
        ...

    def free(self, address: int) -> None:
        """Free what ``allocate`` returned; waits for work that is under way."""
        ...

    def allocate_pinned(self, size: int) -> Pinned:
        """Return ``size`` page-locked bytes of the host."""
        ...

    def free_pinned(self, pinned: Pinned) -> None:
        """Free what ``allocate_pinned`` returned."""
        ...

    def create_stream(self) -> int:
        """Return a queue whose work is done in order, beside that of other streams."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream whose work is done."""
        ...

    def copy_in(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from the host to the device."""
        ...

    def copy_out(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from the device to the host."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until a stream's work is done."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues on a stream from now on, instead of doing it."""
        ...

    def end_capture(self, stream: int) -> int:
        """Return what was recorded, ready to be launched."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph as one piece of work."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Destroy a captured graph that is not under way."""
        ...


def aligned(size: int) -> int:
    """Return a size rounded up to the next tensor's beginning."""
    return -(-size // ALIGNMENT) * ALIGNMENT


_LOST = "the GPU's state is lost for this process; restart the process, and report this line if it comes back"
_BUSY = "another process holds the GPU (exclusive mode, or MIG without an instance); stop it, or choose another GPU"
_REBOOT = "the driver's parts are of different versions; reboot, or install the driver again"

# From cudaError_t of CUDA 12.9 and 13.x; the first sentence of each code's documentation is what NVIDIA's text says.
_ADVICE: dict[str, str] = {
    "cudaErrorMemoryAllocation": "choose a smaller batch or table, or stop other programs on the GPU",
    "cudaErrorInsufficientDriver": "no NVIDIA driver, or one older than the installed cuda-bindings; update the driver",
    "cudaErrorCallRequiresNewerDriver": "update the NVIDIA driver",
    "cudaErrorNoDevice": "no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorInvalidDevice": "no NVIDIA GPU of that number; check CUDA_VISIBLE_DEVICES",
    "cudaErrorNoKernelImageForDevice": "the engine holds no code for this GPU; build it again on or for this GPU",
    "cudaErrorUnsupportedPtxVersion": "the driver is older than the engine's code; update the NVIDIA driver",
    "cudaErrorDevicesUnavailable": _BUSY,
    "cudaErrorDeviceAlreadyInUse": _BUSY,
    "cudaErrorSystemDriverMismatch": _REBOOT,
    "cudaErrorSystemNotReady": "the GPU's services are not running yet; start nvidia-fabricmanager, or wait",
    "cudaErrorCompatNotSupportedOnDevice": "update the driver: only data-centre GPUs run newer code on an old one",
    "cudaErrorIllegalAddress": _LOST,
    "cudaErrorMisalignedAddress": _LOST,
    "cudaErrorInvalidAddressSpace": _LOST,
    "cudaErrorInvalidPc": _LOST,
    "cudaErrorIllegalInstruction": _LOST,
    "cudaErrorHardwareStackError": _LOST,
    "cudaErrorLaunchFailure": _LOST,
    "cudaErrorLaunchTimeout": "a desktop's watchdog stopped it; use a GPU without a display, and restart the process",
    "cudaErrorAssert": _LOST,
    "cudaErrorUnknown": _LOST,
    "cudaErrorECCUncorrectable": "the GPU's memory is faulty; restart the process, replace the GPU if it recurs",
    "cudaErrorContained": _LOST,
    "cudaErrorInitializationError": "the driver could not be started; check nvidia-smi, do not fork after a first use",
    "cudaErrorCudartUnloading": "the process is ending",
}

_OTHERWISE = "restart the process, and report this line if it comes back"

OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


def cuda_fault(call: str, code: str, text: str) -> BackendError:
    """Return the error for a CUDA call that failed.

    Args:
        call: The function's name, e.g. ``cudaMalloc``.
        code: The error's name, e.g. ``cudaErrorIllegalAddress``.
        text: NVIDIA's words for it.
    """
    return BackendError(f"{call} failed with {code} ({text}): {_ADVICE.get(code, _OTHERWISE)}")


def memory_fault(purpose: str, size: int, free: int | None) -> BackendError:
    """Return the error for device memory that is not there.

    Args:
        purpose: What the memory is for.
        size: How many bytes are needed.
        free: How many bytes are free, or None if the GPU does not say.
    """
    found = "" if free is None else f", {free} are free"
    return BackendError(f"out of GPU memory: {purpose} needs {size} bytes{found}; {_ADVICE[OUT_OF_MEMORY]}")
