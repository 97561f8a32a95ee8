"""The GPU architectures that engines are compiled for, by NVIDIA's names: ``sm_89`` is compute capability 8.9."""

from __future__ import annotations

import re

from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.errors import BuildError, SpecError
from vpdeploy.machine import Gpu, gpu_obstacle

_SM = re.compile(r"(?:sm_?)?(\d{2,3})|(\d{1,2})\.(\d)", re.IGNORECASE)

MODELS = {
    "sm_75": "RTX 20, GTX 16, T4, Quadro RTX",
    "sm_80": "A100, A30",
    "sm_86": "RTX 30, A2, A10, A16, A40, RTX A2000-A6000",
    "sm_87": "Jetson Orin",
    "sm_89": "RTX 40, L4, L40, L40S, RTX Ada generation",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_110": "Jetson Thor",
    "sm_120": "RTX 50, RTX PRO Blackwell",
    "sm_121": "GB10 (DGX Spark)",
}
"""Well-known GPUs by architecture (developer.nvidia.com/cuda-gpus)."""


def sm_number(sm: str) -> int:
    """Return the number in an architecture's name, e.g. 89 for ``sm_89``."""
    return int(sm.removeprefix("sm_"))


def parse_targets(text: str) -> tuple[str, ...]:
    """Read a list such as ``sm_86,sm_89``; ``86``, ``SM86`` and ``8.6`` mean the same.

    Returns:
        Names in the form ``sm_86``, ascending, each once.

    Raises:
        SpecError: A part is no architecture.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _SM.fullmatch(part.strip())
        if match is None:
            raise SpecError(f"--target {text}: '{part.strip()}' is no GPU architecture; write e.g. sm_86,sm_89")
        found.add(int(match[1] or match[2] + match[3]))
    return tuple(f"sm_{number}" for number in sorted(found))


def supported_targets(toolkit: Toolkit) -> tuple[str, ...]:
    """Return the architectures that a runtime compiles for ahead of time, ascending; empty if it cannot."""
    if not toolkit.spec.ahead_of_time:
        return ()
    names = toolkit.module.ComputeCapability.__members__
    return tuple(f"sm_{number}" for number in sorted(int(name[2:]) for name in names if name.startswith("SM")))


def choose_targets(toolkit: Toolkit, asked: tuple[str, ...] | None, gpu: Gpu | None) -> tuple[str, ...]:
    """Return the architectures to build for: those asked for, else this GPU's.

    Args:
        toolkit: The runtime that builds.
        asked: The architectures asked for, as ``parse_targets`` returns them, or None.
        gpu: This machine's GPU, or None.

    Raises:
        BuildError: The runtime cannot build for them here.
    """
    if toolkit.spec.ahead_of_time:
        return _ahead_of_time(toolkit, asked, gpu)
    title = toolkit.spec.title
    if gpu is None:
        raise BuildError(
            f"{title} builds engines on the GPU that will run them, and here is none ({gpu_obstacle()}); run the "
            "command on that machine, or build ahead of time with --runtime tensorrt-rtx --target SM"
        )
    if asked is not None and asked != (gpu.sm,):
        raise BuildError(
            f"--target {','.join(asked)}: {title} builds for the GPU that is here, {gpu.name} ({gpu.sm}), alone; "
            "run the command on the other machine, or see --hardware"
        )
    return (gpu.sm,)


def _ahead_of_time(toolkit: Toolkit, asked: tuple[str, ...] | None, gpu: Gpu | None) -> tuple[str, ...]:
    supported = supported_targets(toolkit)
    known = ", ".join(supported)
    if asked is None and gpu is None:
        raise BuildError(f"no GPU is here to build for ({gpu_obstacle()}); name the GPUs with --target: {known}")
    chosen = asked if asked is not None else (gpu.sm,) if gpu is not None else ()
    for sm in chosen:
        if sm not in supported:
            models = f" ({MODELS[sm]})" if sm in MODELS else ""
            raise BuildError(
                f"{toolkit.spec.title} {toolkit.version} has no target {sm}{models}; it has: {known}; "
                "on the GPU itself, --runtime tensorrt may build for it"
            )
    return chosen
