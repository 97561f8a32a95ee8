"""Which error ends the process with which code, and which extra brings a missing module. One table each."""

from __future__ import annotations

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


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """Return the error that names the extra, or None if no extra of vpdeploy brings the module."""
    module = (error.name or "").partition(".")[0]
    return MissingExtraError(module, _EXTRAS[module]) if module in _EXTRAS else None
