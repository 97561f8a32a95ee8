"""Checks of the installation: vpdeploy, its runtimes, and what its extras bring."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions

import vpdeploy
from vpdeploy.engines.toolkit import TOOLKITS, is_installed, load_toolkit
from vpdeploy.errors import VpdeployError
from vpdeploy.inspection.finding import Finding
from vpdeploy.machine import find_gpu, gpu_obstacle

_EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": ("fastapi", "uvicorn", "httptools", "python_multipart", "PIL", "prometheus_client"),
    "grpc": ("grpc",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "train": ("torch", "torchvision", "timm", "lightning_fabric", "safetensors", "PIL", "sklearn", "matplotlib"),
    "sweep": ("optuna",),
    "hf": ("datasets",),
    "export": ("onnx", "onnx_ir", "onnxscript"),
}
"""The modules that each extra brings; none of them is imported here."""

_NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"

_PROBE_S = 60
_PROBE = "import json, onnxruntime as o; print(json.dumps([o.__version__, o.__file__, o.get_available_providers()]))"
"""Asked of a process of its own: a broken library may end it, and must not end this one."""

_GPU_PROVIDERS = {
    "CUDAExecutionProvider": "onnxruntime-cuda",
    "TensorrtExecutionProvider": "onnxruntime-tensorrt",
    "NvTensorRTRTXExecutionProvider": "onnxruntime-tensorrt-rtx",
}


def check_installation() -> Iterator[Finding]:
    """Tell what is installed, and in which Python."""
    place = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    yield Finding(subject="vpdeploy", status="ok", text=f"{vpdeploy.__version__}, {place}")


def check_onnxruntime() -> Iterator[Finding]:
    """Check ONNX Runtime's packages, whether it can be loaded, and which providers it has."""
    packages = _onnxruntime_packages()
    subject = "ONNX Runtime"
    if len(packages) > 1:
        wanted = "onnxruntime-gpu" if "onnxruntime-gpu" in packages else sorted(packages)[0]
        listed = ", ".join(f"{name} {number}" for name, number in sorted(packages.items()))
        yield Finding(
            subject=subject,
            status="wrong",
            text=f"{len(packages)} packages share one folder and overwrite each other's files: {listed}",
            mend=f"pip uninstall -y {' '.join(sorted(packages))} && pip install {wanted}",
        )
    # Conda and systems package it under other names.
    if not packages and importlib.util.find_spec("onnxruntime") is None:
        yield Finding(subject=subject, status="wrong", text="is not installed", mend="pip install vpdeploy")
        return
    probed = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=False
    )
    if probed.returncode != 0:
        last = (probed.stderr.strip().splitlines() or [f"the process ended with code {probed.returncode}"])[-1]
        named = " ".join(sorted(packages)) or "onnxruntime"
        yield Finding(
            subject=subject,
            status="wrong",
            text=f"cannot be loaded: {last[:300]}",
            mend=f"pip install --force-reinstall {named}",
        )
        return
    number, _, providers = json.loads(probed.stdout.strip().splitlines()[-1])
    name = "/".join(sorted(packages)) or "onnxruntime"
    yield Finding(subject=subject, status="ok", text=f"{name} {number}: {', '.join(providers)}")
    obstacle = gpu_obstacle()
    for provider, runtime in _GPU_PROVIDERS.items():
        if provider in providers:
            if obstacle is not None:
                yield Finding(subject=runtime, status="note", text=f"built in, of no use here: {obstacle}")
        elif obstacle is None and provider == "CUDAExecutionProvider":
            yield Finding(
                subject=runtime,
                status="wrong",
                text="there is a GPU, and this ONNX Runtime was built without CUDA",
                mend=f"pip uninstall -y {' '.join(sorted(packages))} && pip install onnxruntime-gpu",
            )
        else:
            reason = obstacle or "this ONNX Runtime was built without it"
            yield Finding(subject=runtime, status="note", text=f"missing: {reason}")


def check_toolkits() -> Iterator[Finding]:
    """Check TensorRT and TensorRT-RTX."""
    has_gpu = find_gpu() is not None
    for runtime, spec in TOOLKITS.items():
        if not is_installed(runtime):
            yield Finding(
                subject=runtime,
                status="note",
                text="is not installed" if has_gpu else "is not installed, and there is no GPU to run it",
                mend=f"pip install {_NVIDIA_INDEX} 'vpdeploy[{spec.extra}]'" if has_gpu else None,
            )
            continue
        try:
            text = load_toolkit(runtime).version
        except (VpdeployError, ImportError, OSError) as error:
            yield Finding(
                subject=runtime,
                status="wrong",
                text=f"is installed and cannot be loaded: {' '.join(str(error).split())}",
                mend=f"pip install --force-reinstall {_NVIDIA_INDEX} 'vpdeploy[{spec.extra}]'",
            )
            continue
        if has_gpu and importlib.util.find_spec("cuda") is None:
            yield Finding(
                subject=runtime,
                status="wrong",
                text=f"{text}, without cuda-bindings to run engines with",
                mend="pip install cuda-bindings",
            )
        else:
            yield Finding(
                subject=runtime, status="ok", text=f"{text}{'' if has_gpu else ' (builds; no GPU to run on)'}"
            )


def check_pictures() -> Iterator[Finding]:
    """Check the library that decodes pictures."""
    if importlib.util.find_spec("PIL") is None:
        yield Finding(
            subject="Pillow",
            status="note",
            text="is not installed: pixels can be classified, files cannot",
            mend="pip install pillow",
        )
        return
    from PIL import features

    number = features.version("pil")
    if features.check_feature("libjpeg_turbo"):
        turbo = features.version_feature("libjpeg_turbo")
        yield Finding(subject="Pillow", status="ok", text=f"{number} with libjpeg-turbo {turbo}")
    else:
        yield Finding(
            subject="Pillow",
            status="note",
            text=f"{number} was built without libjpeg-turbo: JPEGs decode several times slower",
            mend="pip install --force-reinstall --only-binary :all: pillow",
        )


def check_extras() -> Iterator[Finding]:
    """Check which extras are complete."""
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if not _is_there(module)]
        if not missing:
            yield Finding(subject=f"extra {extra}", status="ok", text="complete")
        else:
            text = "not installed" if len(missing) == len(modules) else f"not complete: {', '.join(missing)} missing"
            yield Finding(subject=f"extra {extra}", status="note", text=text, mend=f"pip install 'vpdeploy[{extra}]'")


def _is_there(module: str) -> bool:
    """Tell whether a module could be imported, without importing it; a parent package is at most looked at."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def _onnxruntime_packages() -> dict[str, str]:
    """Return the version of each installed package that brings the module ``onnxruntime``, by name."""
    found = {}
    for each in distributions():
        name = (each.metadata["Name"] or "").lower().replace("_", "-")
        if name == "onnxruntime" or (name.startswith("onnxruntime-") and _brings_onnxruntime(name)):
            found[name] = each.version
    return found


def _brings_onnxruntime(name: str) -> bool:
    """Tell whether a package is ONNX Runtime itself, not an addition to it."""
    return name in {
        f"onnxruntime-{kind}" for kind in ("gpu", "openvino", "directml", "qnn", "training", "rocm", "migraphx")
    }
