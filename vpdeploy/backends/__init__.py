"""Inference runtimes behind one protocol. A runtime is one file and one line in ``RUNTIMES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpdeploy.backends.protocol import Backend
from vpdeploy.errors import BackendError, SpecError

__all__ = ["AUTO", "RUNTIMES", "Backend", "Runtime", "open_backend"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run a graph.

    Attributes:
        obstacle: Returns why the runtime cannot work here, or None; cheap, and loads no graph.
        open: Loads a graph: path, CPU threads (None: the runtime's choice), and the reason to note for the choice.
    """

    obstacle: Callable[[], str | None]
    open: Callable[[Path, int | None, str], Backend]


def _cuda_obstacle() -> str | None:
    from vpdeploy.backends.ort import cuda_obstacle

    return cuda_obstacle()


def _open_cuda(graph: Path, threads: int | None, reason: str) -> Backend:
    from vpdeploy.backends.ort import CUDA_PROVIDER, OrtBackend

    return OrtBackend(graph, provider=CUDA_PROVIDER, threads=threads, reason=reason)


def _open_cpu(graph: Path, threads: int | None, reason: str) -> Backend:
    from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend

    return OrtBackend(graph, provider=CPU_PROVIDER, threads=threads, reason=reason)


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime-cuda": Runtime(obstacle=_cuda_obstacle, open=_open_cuda),
    "onnxruntime-cpu": Runtime(obstacle=lambda: None, open=_open_cpu),
}
"""By name, the fastest first."""


def open_backend(graph: Path, *, runtime: str = AUTO, threads: int | None = None) -> Backend:
    """Load a graph with the runtime asked for, or with the fastest that works here.

    Args:
        graph: An ONNX file.
        runtime: A name in ``RUNTIMES``, or ``auto``.
        threads: CPU threads inside one run; None leaves it to the runtime.

    Raises:
        SpecError: There is no runtime of that name.
        BackendError: The runtime asked for does not work here, or none does; it is never replaced by a slower one.
    """
    if runtime != AUTO:
        if runtime not in RUNTIMES:
            raise SpecError(f"unknown runtime '{runtime}'; choose one of: {AUTO}, {', '.join(RUNTIMES)}")
        if obstacle := RUNTIMES[runtime].obstacle():
            raise BackendError(f"runtime '{runtime}' does not work here: {obstacle}")
        return RUNTIMES[runtime].open(graph, threads, "asked for")
    obstacles: list[str] = []
    for name, candidate in RUNTIMES.items():
        if obstacle := candidate.obstacle():
            obstacles.append(f"{name}: {obstacle}")
            continue
        return candidate.open(graph, threads, "; ".join([*obstacles, "fastest that works here"]))
    raise BackendError(f"no runtime works here: {'; '.join(obstacles)}")
