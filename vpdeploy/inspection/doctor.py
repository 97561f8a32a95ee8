"""The doctor: what of this machine, this installation and a bundle works, what does not, and what mends it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vpdeploy.inspection.bundle_checks import check_path
from vpdeploy.inspection.finding import Check, Finding, run_check
from vpdeploy.inspection.installation_checks import (
    check_extras,
    check_installation,
    check_onnxruntime,
    check_pictures,
    check_toolkits,
)
from vpdeploy.inspection.machine_checks import check_cpu, check_files, check_gpu, check_memory, check_port


def examine(path: Path | None, *, host: str, port: int) -> list[Finding]:
    """Look at everything; nothing that is broken keeps the rest from being looked at.

    Args:
        path: A bundle, a run, an ONNX file or an engine; None for the machine alone.
        host: The address that the server is to listen on.
        port: The port.

    Returns:
        What was found, in the order in which it is best read.
    """
    checks: dict[str, Check] = {
        "vpdeploy": check_installation,
        "processor": check_cpu,
        "memory": check_memory,
        "GPU": check_gpu,
        "ONNX Runtime": check_onnxruntime,
        "TensorRT": check_toolkits,
        "Pillow": check_pictures,
        "extras": check_extras,
        "open files": check_files,
        "port": partial(check_port, host, port),
    }
    if path is not None:
        checks[str(path)] = partial(check_path, path)
    return [finding for subject, check in checks.items() for finding in run_check(subject, check)]
