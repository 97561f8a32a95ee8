"""ONNX Runtime's execution providers: what each needs, and the options it is given for a graph."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpdeploy.errors import BackendError, MissingExtraError, VpdeployError
from vpdeploy.format.artifact import Artifact
from vpdeploy.machine import gpu_obstacle

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
RTX_PROVIDER = "NvTensorRTRTXExecutionProvider"

RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The package that brings TensorRT-RTX to an ONNX Runtime that was built without it."""

QUIET = 3  # ONNX Runtime's log level "error": it warns about missing GPUs on every CPU machine

_NVINFER = "nvinfer_10.dll" if sys.platform == "win32" else "libnvinfer.so.10"  # what onnxruntime-gpu 1.31 links


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One of ONNX Runtime's ways to execute a graph.

    Attributes:
        name: The provider's name in ONNX Runtime.
        runtime: The runtime's name, as ``--runtime`` takes it.
        device: Where the table lies, in ONNX Runtime's words.
        fallbacks: Providers for operators that it does not take.
        obstacle: Returns why it cannot run a graph here, or None.
        options: Returns the provider's settings for a graph, which are needed only once the graph is opened.
        plugin: A package whose library has to be registered first, where ONNX Runtime was built without the provider.
        has_profiles: Whether it builds for the default profile's sizes, and would build anew for larger ones.
    """

    name: str
    runtime: str
    device: str
    obstacle: Callable[[Artifact], str | None]
    fallbacks: tuple[str, ...] = (CPU_PROVIDER,)
    options: Callable[[Artifact], dict[str, str]] = lambda artifact: {}
    plugin: str | None = None
    has_profiles: bool = False


def tensorrt_options(artifact: Artifact) -> dict[str, str]:
    """Return the settings of ONNX Runtime's TensorRT provider: profiles, and caches beside the graph.

    The graph carries its types, so no precision is asked for.
    """
    folder = str(_cache_folder(artifact))
    return {
        **_profile_options(artifact, "trt_profile_{}_shapes"),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }


def rtx_options(artifact: Artifact) -> dict[str, str]:
    """Return the settings of ONNX Runtime's TensorRT-RTX provider: profiles, its own CUDA graphs, and its cache."""
    return {
        **_profile_options(artifact, "nv_profile_{}_shapes"),
        "enable_cuda_graph": "0",
        "nv_runtime_cache_path": str(_cache_folder(artifact)),
    }


def cpu_obstacle(artifact: Artifact) -> str | None:
    """Return why the CPU cannot run a graph, or None."""
    if artifact.precision == "bf16":
        return "ONNX Runtime's CPU provider has no bfloat16 kernels; export without --bf16 for a CPU"
    return None


def cuda_obstacle(artifact: Artifact) -> str | None:
    """Return why ONNX Runtime's CUDA provider cannot work here, or None.

    The driver is asked directly: trying the provider on a machine without a GPU prints several lines of errors.
    """
    if obstacle := gpu_obstacle():
        return obstacle
    if CUDA_PROVIDER not in onnxruntime().get_available_providers():
        return "the installed onnxruntime has no CUDA provider (install onnxruntime-gpu)"
    return None


def tensorrt_obstacle(artifact: Artifact) -> str | None:
    """Return why ONNX Runtime's TensorRT provider cannot work here, or None."""
    if obstacle := gpu_obstacle():
        return obstacle
    if TENSORRT_PROVIDER not in onnxruntime().get_available_providers():
        return "the installed onnxruntime has no TensorRT provider (install onnxruntime-gpu)"
    if not _can_load(_NVINFER):
        return f"{_NVINFER} is missing (install TensorRT 10; with TensorRT 11 use --runtime tensorrt)"
    return None


def rtx_obstacle(artifact: Artifact) -> str | None:
    """Return why ONNX Runtime's TensorRT-RTX provider cannot work here, or None."""
    if obstacle := gpu_obstacle():
        return obstacle
    available = onnxruntime().get_available_providers()
    if RTX_PROVIDER in available:
        return None
    if importlib.util.find_spec(RTX_PLUGIN) is None:
        return (
            "the installed onnxruntime has no TensorRT-RTX provider (pip uninstall onnxruntime-gpu, then pip install "
            "onnxruntime onnxruntime-ep-nv-tensorrt-rtx; or use --runtime tensorrt-rtx, which needs neither)"
        )
    if CUDA_PROVIDER in available:
        return "its plug-in works with onnxruntime only, here is onnxruntime-gpu (pip uninstall it, install the other)"
    return None


def plugin_devices(package: str) -> list[Any]:
    """Register a plug-in's library once, and return the devices that ONNX Runtime then knows of.

    Raises:
        BackendError: The library cannot be loaded, or finds no GPU that it works on.
    """
    plugin: Any = importlib.import_module(package)
    name = plugin.get_ep_name()
    with ort_errors(f"{package}: its library cannot be loaded", advice="install it again"):
        _register(package)
    devices = [device for device in onnxruntime().get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendError(f"{package} finds no GPU that it works on (RTX 30 series or later); use another --runtime")
    return devices[:1]


def onnxruntime() -> Any:
    """Import ONNX Runtime, quietly.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import onnxruntime as module
    except ModuleNotFoundError:
        raise MissingExtraError("onnxruntime", "all") from None
    module.set_default_logger_severity(QUIET)
    return module


def session_options(threads: int | None) -> Any:
    """Return the options that every ONNX Runtime session of this project starts from.

    Args:
        threads: CPU threads inside one run; None leaves it to ONNX Runtime.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    options = onnxruntime().SessionOptions()
    options.log_severity_level = QUIET
    # Threads may spin within a run, not between runs: decoding and other sessions need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(
    graph: Path,
    provider: str = CPU_PROVIDER,
    *,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Any:
    """Load an ONNX file into ONNX Runtime; there is no other place that does.

    Args:
        graph: The file.
        provider: A key of ``PROVIDERS``; it runs what it takes, its fallbacks the rest.
        threads: CPU threads inside one run; None leaves it to ONNX Runtime.
        options: The provider's settings.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        BackendError: The graph cannot be loaded, or the provider does not work here.
        MissingExtraError: ONNX Runtime is not installed.
    """
    chosen, settings, listed = PROVIDERS[provider], session_options(threads), dict(options or {})
    started, arguments = provider, {}
    if (plugin := plugin_of(chosen)) is not None:
        devices = plugin_devices(plugin)
        with ort_errors(f"{provider} cannot be started"):
            settings.add_provider_for_devices(devices, listed)
        started = devices[0].ep_name
    else:
        arguments["providers"] = [(provider, listed), *((name, {}) for name in chosen.fallbacks)]
    with ort_errors(f"{graph}: ONNX Runtime cannot load it"):
        session = onnxruntime().InferenceSession(str(graph), settings, **arguments)
    if session.get_providers()[0] != started:
        raise BackendError(
            f"{started} could not be started (are its CUDA and cuDNN libraries installed?); "
            f"choose --runtime {PROVIDERS[CPU_PROVIDER].runtime} to run without it"
        )
    return session


def plugin_of(provider: Provider) -> str | None:
    """Return the package whose library brings a provider to this ONNX Runtime; None where it is built in."""
    return None if provider.name in onnxruntime().get_available_providers() else provider.plugin


@contextlib.contextmanager
def ort_errors(what: str, *, advice: str = "", kind: type[VpdeployError] = BackendError) -> Iterator[None]:
    """Map what ONNX Runtime raises to one error of ours, in one line; ours pass as they are.

    ONNX Runtime has a class for each of its status codes, and they share no base but ``Exception``.

    Args:
        what: What failed; the message begins with it.
        advice: What to do or what became of the work; the message ends with it.
        kind: Which of our errors it becomes.

    Raises:
        BackendError: ONNX Runtime raised; another class where ``kind`` is one.
    """
    try:
        yield
    except VpdeployError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise kind(f"{what}: {reason}{f'; {advice}' if advice else ''}") from error


@functools.cache
def _register(package: str) -> None:
    plugin: Any = importlib.import_module(package)
    onnxruntime().register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())


def _profile_options(artifact: Artifact, option: str) -> dict[str, str]:
    """Return the three options that bound every input: with a shape beyond them, the provider would build anew."""
    from vpdeploy.engines.profile import Profile, present_sizes

    profile = Profile().completed(artifact, present_sizes(artifact))
    shapes = {name: profile.shapes_of(binding) for name, binding in artifact.interface.inputs.items()}
    return {
        option.format(bound): ",".join(f"{name}:{'x'.join(map(str, each[index]))}" for name, each in shapes.items())
        for index, bound in enumerate(("min", "opt", "max"))
    }


def _cache_folder(artifact: Artifact) -> Path:
    """Make the folder for what a provider builds, and return it.

    There is one for each graph, as providers do not look at its hash; and they make no parent folders.

    Raises:
        BackendError: It cannot be written.
    """
    folder = artifact.engines_folder / f"onnxruntime-{artifact.sha256[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"{folder}: cannot be made for the engines that ONNX Runtime builds ({error.strerror}); make "
            f"{artifact.engines_folder.parent} writable, or choose another --runtime"
        ) from error
    return folder


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(name=CPU_PROVIDER, runtime="onnxruntime-cpu", device="cpu", obstacle=cpu_obstacle, fallbacks=()),
        Provider(name=CUDA_PROVIDER, runtime="onnxruntime-cuda", device="cuda", obstacle=cuda_obstacle),
        Provider(
            name=TENSORRT_PROVIDER,
            runtime="onnxruntime-tensorrt",
            device="cuda",
            obstacle=tensorrt_obstacle,
            fallbacks=(CUDA_PROVIDER, CPU_PROVIDER),
            options=tensorrt_options,
            has_profiles=True,
        ),
        Provider(
            name=RTX_PROVIDER,
            runtime="onnxruntime-tensorrt-rtx",
            device="cuda",
            obstacle=rtx_obstacle,
            options=rtx_options,
            has_profiles=True,
            plugin=RTX_PLUGIN,
        ),
    )
}
"""The providers, by their name in ONNX Runtime."""
