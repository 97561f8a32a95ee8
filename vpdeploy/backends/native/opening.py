"""Opening the native runner: what could keep it from working is asked cheaply first, then in full."""

from __future__ import annotations

from vpdeploy.artifact import Artifact
from vpdeploy.backends.native.backend import NativeBackend
from vpdeploy.backends.native.cuda import CudaDevice, has_bindings
from vpdeploy.backends.native.engine import NativeEngine
from vpdeploy.backends.native.runtime_cache import RuntimeCache
from vpdeploy.engines.sizing import present_sizes
from vpdeploy.engines.store import build_command, engine_obstacle, find_engine, verify_engine
from vpdeploy.engines.toolkit import TOOLKITS, load_toolkit
from vpdeploy.errors import BackendError, MissingExtraError
from vpdeploy.machine import find_gpu, gpu_obstacle


def native_obstacle(artifact: Artifact, runtime: str) -> str | None:
    """Return why an engine of ``runtime`` cannot run here, or None; loads neither graph nor engine."""
    gpu = find_gpu()
    if gpu is None:
        return gpu_obstacle()
    if obstacle := engine_obstacle(artifact, runtime):
        return obstacle
    if not has_bindings():
        return str(MissingExtraError("cuda.bindings", TOOLKITS[runtime].extra))
    found = find_engine(artifact, runtime, gpu)
    if fault := found.card.oversize(present_sizes(artifact)):
        return (
            f"{found.path.name} is too small for the bundle's tasks: {fault}; run: {build_command(artifact, runtime)}"
        )
    return None


def open_native(artifact: Artifact, runtime: str, reason: str) -> NativeBackend:
    """Load the engine of a graph that fits this machine.

    Args:
        artifact: A bundle's or a folded model's.
        runtime: A key of ``TOOLKITS``.
        reason: Why it was chosen.

    Raises:
        EngineIncompatibleError: No engine fits, or the runtime refuses the one that does.
        BundleCorruptError: The engine's file is not what its sidecar says.
        BackendError: There is no GPU, or it cannot hold the engine.
        MissingExtraError: The runtime or ``cuda.bindings`` is not installed.
    """
    toolkit = load_toolkit(runtime)
    gpu = find_gpu()
    if gpu is None:
        raise BackendError(f"runtime '{runtime}' does not work here: {gpu_obstacle()}")
    found = find_engine(artifact, runtime, gpu)
    verify_engine(found)
    device = CudaDevice(toolkit.spec.extra)
    cache = RuntimeCache(found.path, gpu) if runtime == "tensorrt-rtx" else None
    engine = NativeEngine(toolkit, found, artifact, device, cache)
    return NativeBackend(device, engine, gpu=gpu, reason=reason, cache=cache)
