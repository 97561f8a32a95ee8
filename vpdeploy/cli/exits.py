"""Which error ends the process with which code, and which extra brings a missing module. One table each."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import NoReturn

import typer

from vpdeploy.errors import MissingExtraError, ParityError, VpdeployError

OK = 0
KNOWN_ERROR = 1
MISSING_EXTRA = 3
PARITY_FAILED = 4
INTERRUPTED = 130

_CODES: dict[type[VpdeployError], int] = {
    MissingExtraError: MISSING_EXTRA,
    ParityError: PARITY_FAILED,
}

_MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "is killed by signal: Killed",
    "is killed by signal: Bus error",
)
"""What torch says in a plain RuntimeError: its CPU allocator, cuBLAS, the loader of a killed worker."""

_TRAINING_ADVICE = "lower --batch-size, --image-size or --workers, or use --precision bf16"
_MEMORY_ADVICE: dict[str, tuple[str, str]] = {
    "train": ("training", _TRAINING_ADVICE),
    "sweep": ("a trial was training", _TRAINING_ADVICE),
    "eval": ("evaluating", "lower --batch-size, or use --device cpu"),
    "export": ("exporting", "export fewer runs at once, or close other programs"),
}
"""What a verb does, and what to lower where memory does not do."""

_EXTRAS: dict[str, str] = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "lightning_fabric": "train",
    "safetensors": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "tomli": "train",
    "tomli_w": "train",
    "optuna": "sweep",
    "datasets": "hf",
    "huggingface_hub": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "multipart": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "PIL": "serve",
    "grpc": "grpc",
    "google": "grpc",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "cuda": "rtx",
}


def exit_code(error: VpdeployError) -> int:
    """Return the exit code for an error: that of its closest class in the table."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return KNOWN_ERROR


def exit_damaged(damage: Sequence[str]) -> NoReturn:
    """End a report on files of which some are damaged: the report is on stdout, what is wrong is one line on stderr."""
    typer.echo(f"error: {' '.join('; '.join(damage).split())}", err=True)
    raise typer.Exit(KNOWN_ERROR)


def out_of_memory(error: BaseException, verb: str) -> VpdeployError | None:
    """Return the error that says what to lower where memory ran out, or None if that is not what happened.

    Args:
        error: What Python, NumPy or torch raised; torch is recognised by its words, for this package does not load it.
        verb: The verb that was running.
    """
    words = str(error)
    if isinstance(error, OSError):
        ran_out = error.errno == errno.ENOMEM
    elif isinstance(error, RuntimeError):
        ran_out = type(error).__name__ == "OutOfMemoryError" or any(each in words for each in _MEMORY_WORDS)
    else:
        ran_out = isinstance(error, MemoryError)
    if not ran_out:
        return None
    asked = next(iter(re.findall(r"llocate ([\d.]+ ?(?:bytes|[KMGT]i?B))", words)), None)
    device = "the GPU's memory" if "CUDA" in words or "CUBLAS" in words else "memory"
    amount = "" if asked is None else f", {asked} more could not be had"
    doing, advice = _MEMORY_ADVICE.get(verb, ("the command was running", "close other programs"))
    return VpdeployError(f"{device} ran out while {doing}{amount}; {advice}")


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """Return the error that names the extra, or None if no extra of vpdeploy brings the module."""
    module = (error.name or "").partition(".")[0]
    return MissingExtraError(module, _EXTRAS[module]) if module in _EXTRAS else None
