"""Checks of the machine: processor, memory, GPU, limits of the process, and the port."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vpdeploy.inspection.finding import Finding
from vpdeploy.machine import cpu_name, find_gpu, gpu_obstacle, usable_cores
from vpdeploy.text import bytes_text

_CPU_FACTS = Path("/proc/cpuinfo")
_MEMORY_FACTS = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")

_WIDE = {"avx512f": "AVX-512", "avx512_vnni": "VNNI", "amx_int8": "AMX int8", "amx_bf16": "AMX bf16"}
"""Instructions that inference gains from, by the kernel's names."""

_LITTLE_MEMORY = 512 << 20
_FEW_FILES = 2048
"""A server may hold 1024 connections, and needs files beside them."""


def check_cpu() -> Iterator[Finding]:
    """Check the processor's instructions, and how much of it this process may use."""
    flags = _cpu_flags()
    wide = [title for flag, title in _WIDE.items() if flag in flags]
    cores, quota = usable_cores(), cpu_quota()
    text = f"{cpu_name()}, {cores} of {os.cpu_count()} cores"
    if flags and "avx2" not in flags and "asimd" not in flags:
        yield Finding(
            subject="processor", status="note", text=f"{text}; without AVX2, so inference on it is several times slower"
        )
    else:
        yield Finding(subject="processor", status="ok", text=f"{text}{'; ' + ', '.join(wide) if wide else ''}")
    if quota is not None and quota < cores:
        threads = max(1, int(quota))
        yield Finding(
            subject="processor",
            status="note",
            text=f"the control group allows the time of {quota:g} cores; more threads than that are held up in turn",
            mend=f"vpdeploy serve ... --threads {threads}",
        )


def check_memory() -> Iterator[Finding]:
    """Check how much memory is left."""
    available, limit = available_memory(), memory_limit()
    if available is None:
        yield Finding(subject="memory", status="note", text="the system does not tell how much is left")
        return
    text = f"{bytes_text(available)} left"
    if limit is not None:
        text += f", the control group allows {bytes_text(limit)} in all"
    if available < _LITTLE_MEMORY:
        yield Finding(
            subject="memory",
            status="note",
            text=text,
            mend="vpdeploy serve ... --max-buffered-bytes 64MiB; close others",
        )
    else:
        yield Finding(subject="memory", status="ok", text=text)


def check_gpu() -> Iterator[Finding]:
    """Check the driver, and the GPU behind it."""
    gpu = find_gpu()
    if gpu is not None:
        text = f"{gpu.name} ({gpu.sm}), {bytes_text(gpu.memory_bytes)}, driver for CUDA {gpu.cuda_version}"
        yield Finding(subject="GPU", status="ok", text=text)
        return
    obstacle = gpu_obstacle() or "no NVIDIA GPU is visible"
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*")) if Path("/proc/driver/nvidia").is_dir() else []
    if obstacle == "no NVIDIA driver" and not cards and not _has_nvidia_device():
        yield Finding(subject="GPU", status="note", text="none: no NVIDIA driver, and no NVIDIA device on the bus")
    elif obstacle == "no NVIDIA driver":
        yield Finding(
            subject="GPU",
            status="wrong",
            text="there is an NVIDIA device, and libcuda.so.1 cannot be loaded",
            mend="install NVIDIA's driver and restart; in a container: docker run --gpus all ...",
        )
    else:
        yield Finding(subject="GPU", status="wrong", text=obstacle, mend="nvidia-smi")


def check_files() -> Iterator[Finding]:
    """Check how many files and connections this process may open."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        yield Finding(
            subject="open files",
            status="note",
            text=f"at most {soft}; a busy server needs more",
            mend="ulimit -n 65536",
        )
    else:
        yield Finding(subject="open files", status="ok", text=f"at most {soft}")


def check_port(host: str, port: int) -> Iterator[Finding]:
    """Check whether a server could listen on an address."""
    subject = f"port {port}"
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if _is_served(host, port):
                yield Finding(subject=subject, status="ok", text=f"a server answers on {host}:{port} and is live")
                return
            other = port + 1 if port < 65535 else 0
            yield Finding(
                subject=subject,
                status="wrong",
                text=f"{host}:{port} cannot be listened on: {error.strerror}",
                mend=f"vpdeploy serve ... --port {other}   (who has it: ss -ltnp sport = :{port})",
            )
            return
    yield Finding(subject=subject, status="ok", text=f"{host}:{port} is free")


def cpu_quota(root: Path = _CGROUP) -> float | None:
    """Return how many cores' time the control group allows; None where it sets no limit."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # version 1
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return None if quota_us < 0 else quota_us / int((root / "cpu/cpu.cfs_period_us").read_text())
    return None


def memory_limit(root: Path = _CGROUP) -> int | None:
    """Return how many bytes the control group allows; None where it sets no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int((root / name).read_text())
            return limit if limit < 1 << 60 else None  # version 1 writes no limit as a huge number
    return None


def available_memory(root: Path = _CGROUP) -> int | None:
    """Return how many bytes this process may still take; None where the system does not tell."""
    available: int | None = None
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMORY_FACTS.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit = memory_limit(root)
    if limit is not None:
        for name in ("memory.current", "memory/memory.usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                left = max(0, limit - int((root / name).read_text()))
                return left if available is None else min(left, available)
    return available


def _cpu_flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in _CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _has_nvidia_device() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() == "0x10de" and (vendor.parent / "class").read_text().startswith("0x03"):
                return True
    return False


def _is_served(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/v2/health/live")
        answer = connection.getresponse()
        return answer.status == 200 and b'"live"' in answer.read(200)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
