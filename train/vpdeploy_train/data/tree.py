"""Walking folders of images."""

from __future__ import annotations

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
    try:
        return list(folder.iterdir())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpecError(f"{folder}: the folder cannot be read ({reason}): check its permissions") from error


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
    for path in list_folder(folder):
        if is_hidden(path):
            continue
        if path.is_dir():
            yield from _walk(path, above | {here})
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise SpecError(f"{path}: the symbolic link leads nowhere: restore its target or remove it")
