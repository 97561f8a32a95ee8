"""This machine: its processor, memory and GPU.

The GPU is asked of the driver alone: no CUDA toolkit and no Python package is needed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CPU_FACTS = Path("/proc/cpuinfo")

_SM_MAJOR, _SM_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE

# What CUresult's other codes of a failing cuInit ask for (cuda.h).
_REMEDIES = {
    802: "the GPU's services are not running yet; start nvidia-fabricmanager, or wait",
    803: "driver and kernel module are of different versions; reboot, or install the driver again",
    804: "the driver is too old for the CUDA compatibility libraries that are installed; update it",
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first visible NVIDIA GPU; ``CUDA_VISIBLE_DEVICES`` chooses which that is.

    Attributes:
        name: The GPU's name as the driver has it, e.g. ``NVIDIA L4``.
        sm: The GPU's architecture, e.g. ``sm_89``.
        memory_bytes: All of the GPU's memory, in bytes.
        cuda_version: The newest CUDA that the driver supports, e.g. ``13.0``.
    """

    name: str
    sm: str
    memory_bytes: int
    cuda_version: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine is.

    Attributes:
        cpu: The processor's name as the system gives it, or its architecture.
        cores: Cores that this process may use.
        system: Operating system, architecture and Python version.
        gpu: The first visible GPU; None where none can be used.
        gpu_obstacle: Why there is none; None where there is one.
    """

    cpu: str
    cores: int
    system: str
    gpu: Gpu | None
    gpu_obstacle: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return asdict(self)


def describe_machine() -> Machine:
    """Return what this machine is."""
    gpu = find_gpu()
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        gpu=gpu,
        gpu_obstacle=gpu_obstacle() if gpu is None else None,
    )


def find_gpu() -> Gpu | None:
    """Return the first visible GPU, or None if there is none that can be used."""
    driver = _driver()
    count, device = ctypes.c_int(0), ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        return None
    major, minor, version = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _SM_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _SM_MINOR, device)
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if failed:
        return None
    return Gpu(
        name=name.value.decode(errors="replace"),
        sm=f"sm_{major.value}{minor.value}",
        memory_bytes=memory.value,
        cuda_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def gpu_obstacle() -> str | None:
    """Return why no GPU can be used here, or None if one can."""
    driver = _driver()
    if driver is None:
        return "no NVIDIA driver"
    code = driver.cuInit(0)
    if code not in (0, _NO_DEVICE):
        return f"the NVIDIA driver does not start (error {code}): {_REMEDIES.get(code, 'check nvidia-smi')}"
    return None if find_gpu() else "no NVIDIA GPU is visible (check nvidia-smi and CUDA_VISIBLE_DEVICES)"


def cpu_name() -> str:
    """Return the processor's name as the system gives it, or its architecture."""
    try:
        lines = _CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        title, _, value = line.partition(":")
        if title.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int | None:
    """Return the most memory this process has held so far, resident; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
