"""Which device computes, on how many threads and in which precision; what was asked for is never replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from lightning_fabric import Fabric

from vpdeploy.errors import SpecError
from vpdeploy_train.settings import TrainPrecision

_FABRIC_PRECISIONS: Final[dict[TrainPrecision, Any]] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def choose_device(name: str) -> torch.device:
    """Return the device named ``auto``, ``cpu`` or ``cuda``.

    Raises:
        SpecError: The name is unknown, or the device is absent.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SpecError(f"--device '{name}': choose one of auto, cpu, cuda")
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise SpecError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads inside one operation of torch; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)


def make_fabric(precision: TrainPrecision, device: torch.device) -> Fabric:
    """Return what places the model on its device and casts to its precision.

    Raises:
        SpecError: The device does not support the precision.
    """
    if device.type == "cpu" and precision == "fp16":
        raise SpecError("--precision fp16 needs a GPU; use --precision bf16 or fp32 on the CPU")
    return Fabric(accelerator=device.type, devices=1, precision=_FABRIC_PRECISIONS[precision])


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ask torch for repeatable results; on a GPU a few kernels have none and only warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
