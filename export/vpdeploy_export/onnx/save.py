"""Writing an ONNX model: one self-contained file, or above 2 GB a small file and a data file beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from vpdeploy.files import link_target, making_parents, naming_storage_errors, sha256_of_file
from vpdeploy.format.datafile import METADATA_KEY, DataFile
from vpdeploy.partials import partial_folder

MAX_FILE_BYTES = 2_000_000_000
"""Weights that one file takes at most: protobuf ends at 2^31 - 1 bytes, the graph itself included."""

_INLINE_BYTES = 1024  # shape inference reads the small constants
_ALIGNMENT = 4096  # of large tensors in a data file, so that runtimes can map them


def save_model(model: ir.Model, path: Path, *, max_file_bytes: int | None = None) -> DataFile | None:
    """Write a model; it is as it was afterwards. ``vpdeploy.format.onnxfile.append_metadata`` adds what is known later.

    The tensors of a data file are written one after the other, so that memory holds no second copy of the model.

    Args:
        model: The model.
        path: The file; a data file lies beside it and is named for it and for its own contents.
        max_file_bytes: Weights above this go to a data file; None is ``MAX_FILE_BYTES``.

    Returns:
        The data file, or None.

    Raises:
        OSError: A file cannot be written.
    """
    model.metadata_props.pop(METADATA_KEY, None)
    if weight_bytes(model) <= (MAX_FILE_BYTES if max_file_bytes is None else max_file_bytes):
        ir.save(model, path)
        return None
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    original = [value.const_value for value in values]
    partial = path.parent / f".{path.name}.data"
    try:
        ir.external_data.unload_from_model(
            model, path.parent, partial.name, size_threshold_bytes=_INLINE_BYTES, alignment=_ALIGNMENT
        )
        data = _named_by_contents(partial, path.stem)
        for value in values:
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _located(value.const_value, data.name)
        model.metadata_props.update(data.to_metadata())
        ir.save(model, path)
    finally:
        partial.unlink(missing_ok=True)
        model.metadata_props.pop(METADATA_KEY, None)
        for value, tensor in zip(values, original, strict=True):
            value.const_value = tensor
    return data


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``path``, so that publishing what is written there is a rename on one file system.

    It is gone after the block, with whatever was not moved out of it.
    """
    path = link_target(path)
    with (
        making_parents(path),
        naming_storage_errors(path),
        partial_folder(path) as folder,
    ):
        yield folder


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _named_by_contents(partial: Path, stem: str) -> DataFile:
    """Give a data file the name that its digest makes."""
    sha256 = sha256_of_file(partial)
    data = DataFile(name=f"{stem}.{sha256[:12]}.data", sha256=sha256, size_bytes=partial.stat().st_size)
    partial.replace(partial.parent / data.name)
    return data


def _located(tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
    """Return an external tensor that names another file."""
    return ir.ExternalTensor(
        name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )
