"""Traces that all tests and workers share: a trace takes seconds and is all that an export costs.

Torch's tracer alone is replaced: what this project does with a trace runs in every test. A trace is found again by
everything that determines it: the module with its weights, the example inputs and the tracer's options.

Needs torch and onnx; import it inside a fixture or from tests/export only.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from filelock import FileLock

trace = torch.onnx.export
"""Torch's own tracer."""

_LARGEST_BYTES = 16 * 2**20
"""Models of deployed size are traced once at most: no test's gain, and a large file."""


class SharedTraces:
    """A stand-in for ``torch.onnx.export`` that traces what none of the workers has traced yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
        key = _key(module, inputs, options)
        if key is None:
            return trace(module, inputs, **options)
        path = self._folder / f"{key}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                program = trace(module, inputs, **options)
                assert program is not None
                written = path.with_suffix(".part")
                ir.save(program.model, written)
                written.rename(path)
        return SimpleNamespace(model=ir.from_proto(ir.to_proto(ir.load(path))))


def _key(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> str | None:
    """Return a digest of all that a trace depends on, or None for what is too large or cannot be told."""
    if sum(tensor.nbytes for tensor in module.state_dict().values()) > _LARGEST_BYTES:
        return None
    written = io.BytesIO()
    try:
        _TensorsByDigest(written, protocol=5).dump((module, inputs, options))
    except (pickle.PicklingError, AttributeError, TypeError):  # a class that a test defines in its body
        return None
    return hashlib.sha256(written.getvalue()).hexdigest()


class _TensorsByDigest(pickle.Pickler):
    """Pickling tells storages by address; the same numbers have to give the same bytes in every process."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(numbers.tobytes()).hexdigest()
        return tuple, ((str(value.dtype), tuple(value.shape), value.requires_grad, digest),)
