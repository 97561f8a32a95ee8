"""Files of tensors: reading them without running what they hold, and saying what a file is that holds none.

What can be told without torch is told without it, so that a command line can be refused at once.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Final

SAFETENSORS: Final = ".safetensors"

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
    import torch  # takes seconds; the rest of this module does without

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles by other programs
        return torch.load(path, map_location="cpu", weights_only=True)


def file_damage(path: Path) -> str | None:
    """Return what is plainly wrong with a file that should hold tensors, and what to do; None where it seems whole.

    Only its beginning, its length and an archive's list of files are looked at.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    start = _start_of(path)
    if not size:
        return f"it is empty, 0 bytes; {_CUT_OFF}"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; run: git lfs pull"
    if start.lstrip()[:200].lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<error")):
        return "it is a web page (HTML or XML), perhaps a login or an error; download the file itself"
    if _is_text(start):
        return "it is text, not a weights file"
    if start.startswith(b"PK"):
        return _archive_damage(path, size)
    if path.suffix == SAFETENSORS or is_safetensors(path):
        return _safetensors_damage(path, size)
    return None


def is_safetensors(path: Path) -> bool:
    """Tell by its beginning whether a file is one of safetensors, whatever it is called.

    Raises:
        OSError: It cannot be read.
    """
    return _start_of(path)[_LENGTH_BYTES : _LENGTH_BYTES + 2] in (b'{"', b"{}")


def describe_file(path: Path, error: BaseException) -> str:
    """Return what is wrong with a file from which tensors could not be read, and what to do.

    The words of torch are not passed on: they advise to unpickle the file all the same.

    Args:
        path: The file.
        error: What reading it raised.
    """
    if (damage := file_damage(path)) is not None:
        return damage
    size = path.stat().st_size
    if missing := re.search(r"expected (\d+) more bytes", str(error)):
        return f"it is truncated: {size} bytes found, at least {size + int(missing[1])} expected; {_CUT_OFF}"
    if isinstance(error, EOFError):
        return f"it is truncated: {size} bytes found; {_CUT_OFF}"
    return _describe_objects(error) or f"its {size} bytes are of another kind, or damaged; {_CUT_OFF}"


def unreadable(path: Path, reason: str) -> str:
    """Return the line that says why a file of weights cannot be read.

    Args:
        path: The file.
        reason: What is wrong with it.
    """
    return f"{path}: cannot be read as safetensors, .npz or a torch file of tensors alone: {reason}"


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(1024)


def _is_text(start: bytes) -> bool:
    """Tell whether a file's first bytes are text: UTF-8, perhaps cut inside a character, without control characters."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text) and all(each.isprintable() or each in "\t\n\r\f" for each in text)


def _safetensors_damage(path: Path, size: int) -> str | None:
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
    return None


def _archive_damage(path: Path, size: int) -> str | None:
    """Say what is wrong with an archive, of which there are torch's files and .npz."""
    if not zipfile.is_zipfile(path):
        return f"it is truncated: {size} bytes found, and an archive's end is not among them; {_CUT_OFF}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return f"it is damaged ({size} bytes); {_CUT_OFF}"
    if any(name.endswith((".npy", "data.pkl", "version")) for name in names):
        return None
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
