"""What this machine is: processor, memory, GPU."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from vpdeploy.gpu import find_gpu, gpu_obstacle

_CPU_FACTS = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Any]:
    """Return the processor's name and cores, the operating system, and the GPU or why there is none."""
    gpu = find_gpu()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "gpu": None
        if gpu is None
        else {"name": gpu.name, "sm": gpu.sm, "memory_bytes": gpu.memory_bytes, "cuda_version": gpu.cuda_version},
        "gpu_obstacle": gpu_obstacle() if gpu is None else None,
    }


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
