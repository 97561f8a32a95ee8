from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from vpdeploy import machine
from vpdeploy.machine import Gpu, find_gpu, gpu_obstacle


class Driver:
    """The functions of NVIDIA's driver library that are called, answering for one L4."""

    def __init__(self, *, init: int = 0, count: int = 1, failing: str = "") -> None:
        self._init, self._count, self._failing = init, count, failing

    def cuInit(self, flags: int) -> int:
        return self._init

    def cuDeviceGetCount(self, count: Any) -> int:
        return self._set(count, self._count, "cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return self._set(device, 0, "cuDeviceGet")

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA L4"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        return self._set(memory, 24 << 30, "cuDeviceTotalMem_v2")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        return self._set(value, {75: 8, 76: 9}[attribute], "cuDeviceGetAttribute")

    def cuDriverGetVersion(self, version: Any) -> int:
        return self._set(version, 13020, "cuDriverGetVersion")

    def _set(self, target: Any, value: int, name: str) -> int:
        ctypes.cast(target, ctypes.POINTER(type(target._obj))).contents.value = value
        return 1 if name == self._failing else 0


def test_the_driver_tells_name_architecture_memory_and_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_driver", Driver)
    assert find_gpu() == Gpu(name="NVIDIA L4", sm="sm_89", memory_bytes=24 << 30, cuda_version="13.2")
    assert gpu_obstacle() is None


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (None, "no NVIDIA driver"),
        (Driver(init=100), "no NVIDIA GPU is visible (check nvidia-smi and CUDA_VISIBLE_DEVICES)"),
        (Driver(count=0), "no NVIDIA GPU is visible (check nvidia-smi and CUDA_VISIBLE_DEVICES)"),
        (
            Driver(init=803),
            "the NVIDIA driver does not start (error 803): driver and kernel module are of different versions; "
            "reboot, or install the driver again",
        ),
        (Driver(init=999), "the NVIDIA driver does not start (error 999): check nvidia-smi"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: Any, message: str):
    monkeypatch.setattr(machine, "_driver", lambda: driver)
    assert find_gpu() is None
    assert gpu_obstacle() == message


@pytest.mark.parametrize("call", ["cuDeviceGetCount", "cuDeviceGet", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute"])
def test_a_gpu_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch, call: str):
    monkeypatch.setattr(machine, "_driver", lambda: Driver(failing=call))
    assert find_gpu() is None


def test_the_machine_is_described_with_its_gpu(monkeypatch: pytest.MonkeyPatch):
    gpu = Gpu(name="NVIDIA L4", sm="sm_89", memory_bytes=24 << 30, cuda_version="13.0")
    monkeypatch.setattr(machine, "find_gpu", lambda: gpu)
    found = machine.describe_machine()
    assert found.gpu == gpu
    assert found.gpu_obstacle is None
    fields = found.to_json()
    assert list(fields) == ["cpu", "cores", "system", "gpu", "gpu_obstacle"]
    assert fields["gpu"] == {"name": "NVIDIA L4", "sm": "sm_89", "memory_bytes": 24 << 30, "cuda_version": "13.0"}


def test_the_machine_is_described_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "find_gpu", lambda: None)
    monkeypatch.setattr(machine, "gpu_obstacle", lambda: "no NVIDIA driver")
    found = machine.describe_machine()
    assert (found.gpu, found.gpu_obstacle) == (None, "no NVIDIA driver")
    assert found.cores >= 1


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: Some  Processor @ 2 GHz\nmodel name\t: Other\n")
    monkeypatch.setattr(machine, "_CPU_FACTS", facts)
    assert machine.cpu_name() == "Some Processor @ 2 GHz"
    facts.unlink()
    assert machine.cpu_name()


def test_peak_memory_is_in_bytes():
    peak = machine.peak_memory_bytes()
    assert peak is None or 10_000_000 < peak < 10**12
