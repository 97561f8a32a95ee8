"""Inference runtimes behind one protocol. A runtime is one file and one line in ``RUNTIMES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vpdeploy.errors import BackendError, EngineIncompatibleError, SpecError

if TYPE_CHECKING:  # the command line lists the runtimes without loading NumPy
    from vpdeploy.backends.protocol import Backend
    from vpdeploy.format.artifact import Artifact

__all__ = ["AUTO", "RUNTIMES", "Runtime", "open_backend"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run a graph.

    Attributes:
        obstacle: Returns why the runtime cannot run a graph here, or None. It is cheap and loads no graph.
        open: Loads a graph. It takes the number of CPU threads, where None leaves it to the runtime, and the reason to
            note for the choice.
        automatic: ``auto`` may choose it; the others build engines when they start, which can take minutes.
    """

    obstacle: Callable[[Artifact], str | None]
    open: Callable[[Artifact, int | None, str], Backend]
    automatic: bool = True


def _native_obstacle(runtime: str, artifact: Artifact) -> str | None:
    from vpdeploy.backends.native import backend as native

    return native.native_obstacle(artifact, runtime)


def _open_native(runtime: str, artifact: Artifact, threads: int | None, reason: str) -> Backend:
    from vpdeploy.backends.native import backend as native

    return native.open_native(artifact, runtime, reason)


def _ort_obstacle(provider: str, artifact: Artifact) -> str | None:
    from vpdeploy.backends import providers

    return providers.PROVIDERS[provider].obstacle(artifact)


def _open_ort(provider: str, artifact: Artifact, threads: int | None, reason: str) -> Backend:
    from vpdeploy.backends import ort

    return ort.open_ort(artifact, provider, threads, reason)


def _native(runtime: str) -> Runtime:
    return Runtime(obstacle=partial(_native_obstacle, runtime), open=partial(_open_native, runtime))


def _onnxruntime(provider: str, *, automatic: bool = True) -> Runtime:
    return Runtime(obstacle=partial(_ort_obstacle, provider), open=partial(_open_ort, provider), automatic=automatic)


RUNTIMES: dict[str, Runtime] = {
    "tensorrt": _native("tensorrt"),
    "tensorrt-rtx": _native("tensorrt-rtx"),
    "onnxruntime-tensorrt": _onnxruntime("TensorrtExecutionProvider", automatic=False),
    "onnxruntime-tensorrt-rtx": _onnxruntime("NvTensorRTRTXExecutionProvider", automatic=False),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
    "onnxruntime-cpu": _onnxruntime("CPUExecutionProvider"),
}
"""The runtimes by name, the fastest first."""


def check_runtime(runtime: str) -> None:
    """Check a runtime's name, before a graph is read that it could load.

    Args:
        runtime: A name in ``RUNTIMES``, or ``auto``.

    Raises:
        SpecError: There is no runtime of that name.
    """
    if runtime != AUTO and runtime not in RUNTIMES:
        raise SpecError(f"unknown runtime '{runtime}'; choose one of: {AUTO}, {', '.join(RUNTIMES)}")


def open_backend(artifact: Artifact, *, runtime: str = AUTO, threads: int | None = None) -> Backend:
    """Load a graph with the runtime asked for, or with the fastest that works here.

    Args:
        artifact: A bundle or a folded model.
        runtime: A name in ``RUNTIMES``, or ``auto``.
        threads: CPU threads inside one run; None leaves it to the runtime.

    Raises:
        SpecError: There is no runtime of that name.
        BackendError: The runtime asked for does not work here, or none does; it is never replaced by a slower one.
        BundleCorruptError: An engine beside the graph is not what its sidecar says.
        EngineIncompatibleError: The runtime asked for refuses the engine that fits this machine.
    """
    check_runtime(runtime)
    if runtime == AUTO:
        return _open_fastest(artifact, threads)
    if obstacle := RUNTIMES[runtime].obstacle(artifact):
        raise BackendError(f"runtime '{runtime}' does not work here: {obstacle}")
    return RUNTIMES[runtime].open(artifact, threads, "asked for")


def _open_fastest(artifact: Artifact, threads: int | None) -> Backend:
    """Open the first runtime that works; its reason names the obstacle of every faster one."""
    obstacles: dict[str, list[str]] = {}  # runtimes by obstacle: one driver that is missing is said once
    for name, candidate in RUNTIMES.items():
        if not candidate.automatic:
            continue
        obstacle = candidate.obstacle(artifact)
        if obstacle is None:
            reason = "; ".join([*_listed(obstacles), "fastest that works here"])
            try:
                return candidate.open(artifact, threads, reason)
            except (BackendError, EngineIncompatibleError) as error:
                obstacle = str(error)
        obstacles.setdefault(obstacle, []).append(name)
    raise BackendError(f"no runtime works here: {'; '.join(_listed(obstacles))}")


def _listed(obstacles: dict[str, list[str]]) -> list[str]:
    return [f"{', '.join(names)}: {obstacle}" for obstacle, names in obstacles.items()]
