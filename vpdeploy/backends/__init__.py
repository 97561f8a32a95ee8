"""Inference runtimes behind one protocol. A runtime is one file and one line in ``RUNTIMES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vpdeploy.backends.protocol import Backend
from vpdeploy.deployed import DeployedGraph
from vpdeploy.errors import BackendError, SpecError

__all__ = ["AUTO", "RUNTIMES", "Backend", "Runtime", "open_backend"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run a graph.

    Attributes:
        obstacle: Returns why the runtime cannot run a graph here, or None; cheap, and loads no graph.
        open: Loads a graph: CPU threads (None: the runtime's choice), and the reason to note for the choice.
    """

    obstacle: Callable[[DeployedGraph], str | None]
    open: Callable[[DeployedGraph, int | None, str], Backend]


def _cuda_obstacle(graph: DeployedGraph) -> str | None:
    from vpdeploy.backends.ort import cuda_obstacle

    return cuda_obstacle()


def _open_cuda(graph: DeployedGraph, threads: int | None, reason: str) -> Backend:
    from vpdeploy.backends.ort import CUDA_PROVIDER, OrtBackend

    return OrtBackend(graph.path, provider=CUDA_PROVIDER, threads=threads, reason=reason)


def _cpu_obstacle(graph: DeployedGraph) -> str | None:
    if graph.precision == "bf16":
        return "ONNX Runtime's CPU provider has no bfloat16 kernels; export without --bf16 for a CPU"
    return None


def _open_cpu(graph: DeployedGraph, threads: int | None, reason: str) -> Backend:
    from vpdeploy.backends.ort import CPU_PROVIDER, OrtBackend

    return OrtBackend(graph.path, provider=CPU_PROVIDER, threads=threads, reason=reason)


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime-cuda": Runtime(obstacle=_cuda_obstacle, open=_open_cuda),
    "onnxruntime-cpu": Runtime(obstacle=_cpu_obstacle, open=_open_cpu),
}
"""By name, the fastest first."""


def open_backend(graph: DeployedGraph, *, runtime: str = AUTO, threads: int | None = None) -> Backend:
    """Load a graph with the runtime asked for, or with the fastest that works here.

    Args:
        graph: A bundle's or a folded model's.
        runtime: A name in ``RUNTIMES``, or ``auto``.
        threads: CPU threads inside one run; None leaves it to the runtime.

    Raises:
        SpecError: There is no runtime of that name.
        BackendError: The runtime asked for does not work here, or none does; it is never replaced by a slower one.
    """
    if runtime != AUTO:
        if runtime not in RUNTIMES:
            raise SpecError(f"unknown runtime '{runtime}'; choose one of: {AUTO}, {', '.join(RUNTIMES)}")
        if obstacle := RUNTIMES[runtime].obstacle(graph):
            raise BackendError(f"runtime '{runtime}' does not work here: {obstacle}")
        return RUNTIMES[runtime].open(graph, threads, "asked for")
    obstacles: list[str] = []
    for name, candidate in RUNTIMES.items():
        if obstacle := candidate.obstacle(graph):
            obstacles.append(f"{name}: {obstacle}")
            continue
        return candidate.open(graph, threads, "; ".join([*obstacles, "fastest that works here"]))
    raise BackendError(f"no runtime works here: {'; '.join(obstacles)}")
