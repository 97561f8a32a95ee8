"""Writing an ONNX model to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from vpdeploy.errors import ExportError

_MAX_FILE_BYTES = 2**31 - 1


def save_model(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a model with its metadata to one self-contained file.

    Raises:
        ExportError: The file would be larger than ONNX allows.
        OSError: The file cannot be written.
    """
    model.metadata_props.update(metadata)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > _MAX_FILE_BYTES:
        raise ExportError(f"the graph has {size / 1e9:.1f} GB of weights, one ONNX file holds 2 GB; export with --fp16")
    ir.save(model, path)
