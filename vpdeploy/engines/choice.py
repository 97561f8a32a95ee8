"""Which runtime an engine is built for when none is named."""

from __future__ import annotations

from vpdeploy.engines.toolkit import TOOLKITS, is_installed
from vpdeploy.errors import MissingExtraError
from vpdeploy.machine import Gpu


def choose_runtime(targets: tuple[str, ...] | None, gpu: Gpu | None) -> tuple[str, str]:
    """Return a runtime's name and why it was chosen.

    Args:
        targets: The GPU architectures asked for, or None.
        gpu: This machine's, or None.

    Raises:
        MissingExtraError: None is installed.
    """
    installed = [name for name in TOOLKITS if is_installed(name)]
    if not installed:
        spec = TOOLKITS["tensorrt-rtx"]
        raise MissingExtraError(spec.module, spec.extra)
    if len(installed) == 1:
        return installed[0], "the only one installed"
    if gpu is None:
        return "tensorrt-rtx", "no GPU is here, and it needs none"
    if targets is not None and targets != (gpu.sm,):
        return "tensorrt-rtx", f"the other can build for this GPU alone ({gpu.sm})"
    return "tensorrt", f"it times its kernels on this GPU, {gpu.name}"
