"""Files of tensors: reading them without running what they hold, and saying what a file is that holds none."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

_SAFETENSORS = ".safetensors"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, little-endian."""

_MOST_HEADER_BYTES = 100 * 2**20
_CUT_OFF = "copy it again, it is cut off or damaged"
_ALIEN = re.compile(r"GLOBAL ([\w.]+)")
"""What torch says of an object that it was not willing to make."""


def read_torch_file(path: Path) -> Any:
    """Return what a torch file holds: tensors and plain containers; objects are not unpickled.

    Raises:
        Exception: Whatever torch, zip and pickle raise; ``describe_file`` says what it comes from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles by other programs
        return torch.load(path, map_location="cpu", weights_only=True)


def describe_file(path: Path, error: BaseException) -> str:
    """Return what is wrong with a file from which tensors could not be read, and what to do.

    The words of torch are not passed on: they advise to unpickle the file all the same.

    Args:
        path: The file.
        error: What reading it raised.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(1024)
    if not size:
        return f"it is empty, 0 bytes; {_CUT_OFF}"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; run: git lfs pull"
    if start.lstrip()[:200].lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<error")):
        return "it is a web page (HTML or XML), perhaps a login or an error; download the file itself"
    if _is_text(start):
        return "it is text, not a weights file"
    if path.suffix == _SAFETENSORS or start[_LENGTH_BYTES : _LENGTH_BYTES + 2] in (b'{"', b"{}"):
        return _describe_safetensors(path, size)
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return f"it is truncated: {size} bytes found, and an archive's end is not among them; {_CUT_OFF}"
        return _describe_objects(error) or _describe_archive(path, size)
    if missing := re.search(r"expected (\d+) more bytes", str(error)):
        return f"it is truncated: {size} bytes found, at least {size + int(missing[1])} expected; {_CUT_OFF}"
    if isinstance(error, EOFError):
        return f"it is truncated: {size} bytes found; {_CUT_OFF}"
    return _describe_objects(error) or f"its {size} bytes are of another kind, or damaged; {_CUT_OFF}"


def _is_text(start: bytes) -> bool:
    """Tell whether a file's first bytes are text: UTF-8, perhaps cut inside a character, without control characters."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text) and all(each.isprintable() or each in "\t\n\r\f" for each in text)


def _describe_safetensors(path: Path, size: int) -> str:
    """Compare a safetensors file's size with what its header says."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > _MOST_HEADER_BYTES:
            return f"it is no safetensors file, or damaged ({size} bytes); {_CUT_OFF}"
        header = stream.read(length)
    if len(header) < length:
        return f"it is truncated: {size} bytes found, its header alone takes {_LENGTH_BYTES + length}; {_CUT_OFF}"
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = _LENGTH_BYTES + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return f"its header is damaged; {_CUT_OFF}"
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        return f"it is {state}: {size} bytes found, {expected} expected; {_CUT_OFF}"
    return f"its header is damaged; {_CUT_OFF}"


def _describe_archive(path: Path, size: int) -> str:
    """Say what is wrong with an archive that is whole, or seems so."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return f"it is damaged ({size} bytes); {_CUT_OFF}"
    if path.suffix == ".npz" or any(name.endswith("data.pkl") for name in names):
        return f"it is damaged ({size} bytes); {_CUT_OFF}"
    return f"it is an archive of {len(names)} files, {', '.join(names[:3])}, not a torch file; unpack it"


def _describe_objects(error: BaseException) -> str | None:
    """Say so where the file holds objects; None where that is not what is wrong."""
    words = str(error)
    is_refused = isinstance(error, pickle.UnpicklingError) or "allow_pickle" in words
    if not is_refused or "invalid load key" in words:
        return None
    found = _ALIEN.search(words)
    example = f" ({found[1]})" if found is not None else ""
    return f"it holds other objects than tensors{example}; only tensors are read: save model.state_dict() by itself"
