"""Walking folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""The endings of the formats that ``vpdeploy.image`` decodes."""

_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def is_image(path: Path) -> bool:
    """Tell by its ending whether a file is an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_hidden(path: Path) -> bool:
    """Tell whether a file or folder is hidden, or left there by an operating system."""
    return path.name.startswith(".") or path.name.lower() in _CLUTTER


def list_folder(folder: Path) -> list[Path]:
    """Return what a folder holds, in no particular order.

    Raises:
        SpecError: The folder cannot be read.
    """
    return [folder / entry.name for entry in _scan(folder)]


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the visible files below a folder, at any depth, following symbolic links.

    Raises:
        SpecError: A folder cannot be read, or a symbolic link is broken or leads back to a folder above it.
    """
    yield from _walk(folder, frozenset())


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield the files below a folder whose parents, resolved, are ``above``."""
    here = folder.resolve()
    if here in above:
        raise SpecError(f"{folder}: the symbolic link leads back to a folder above it: remove it")
    for entry in _scan(folder):
        path = folder / entry.name
        if is_hidden(path):
            continue
        # The folder's own listing tells files from folders: only symbolic links are looked at one by one.
        found = path if entry.is_symlink() else entry
        if found.is_dir():
            yield from _walk(path, above | {here})
        elif found.is_file():
            yield path
        elif found is path:
            raise SpecError(f"{path}: the symbolic link leads nowhere: restore its target or remove it")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder.

    Raises:
        SpecError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpecError(f"{folder}: the folder cannot be read ({reason}): check its permissions") from error
