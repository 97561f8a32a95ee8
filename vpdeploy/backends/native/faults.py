"""Error codes of the CUDA runtime in one line each: what happened, and what to do."""

from __future__ import annotations

from vpdeploy.errors import BackendError

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
        call: The function, e.g. ``cudaMalloc``.
        code: The error's name, e.g. ``cudaErrorIllegalAddress``.
        text: NVIDIA's words for it.
    """
    return BackendError(f"{call} failed with {code} ({text}): {_ADVICE.get(code, _OTHERWISE)}")


def memory_fault(purpose: str, size: int, free: int | None) -> BackendError:
    """Return the error for device memory that is not there.

    Args:
        purpose: What it is for.
        size: Bytes that are needed.
        free: Bytes that are free, or None if the GPU does not say.
    """
    found = "" if free is None else f", {free} are free"
    return BackendError(f"out of GPU memory: {purpose} needs {size} bytes{found}; {_ADVICE[OUT_OF_MEMORY]}")
