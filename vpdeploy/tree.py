"""Walking folders of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""The endings of the formats that ``vpdeploy.image`` decodes."""

_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """What keeps a walk from the files behind it.

    Attributes:
        path: A folder or a symbolic link.
        reason: What is the matter with it, and what to do.
    """

    path: Path
    reason: str


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key under which ``class2`` comes before ``class10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    key = [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part.casefold()) for part in parts]
    return key, name


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
        return [folder / entry.name for entry in _scan(folder)]
    except OSError as error:
        raise SpecError(f"{folder}: {_unreadable(error)}") from error


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the visible files below a folder, at any depth, following symbolic links.

    Raises:
        SpecError: A folder cannot be read, or a symbolic link is broken or leads back to a folder above it.
    """
    for found in explore(folder):
        if isinstance(found, Obstacle):
            raise SpecError(f"{found.path}: {found.reason}")
        yield found


def explore(folder: Path) -> Iterator[Path | Obstacle]:
    """Yield the visible files below a folder, at any depth, following symbolic links, and what keeps from others.

    What is neither a file nor a folder is passed over: pipes, sockets, devices.
    """
    try:
        above = frozenset(folder.resolve().parents)  # a link to one of these leads back here as well
    except OSError:
        above = frozenset()
    yield from _explore(folder, above)


def _explore(folder: Path, above: frozenset[Path]) -> Iterator[Path | Obstacle]:
    """Explore a folder whose parents, resolved, are ``above``."""
    try:
        here = folder.resolve()
        entries = _scan(folder)
    except OSError as error:
        yield Obstacle(path=folder, reason=_unreadable(error))
        return
    if here in above:
        yield Obstacle(path=folder, reason="the symbolic link leads back to a folder above it: remove it")
        return
    for entry in entries:
        path = folder / entry.name
        if is_hidden(path):
            continue
        # The folder's own listing tells files from folders: only symbolic links are looked at one by one.
        found = path if entry.is_symlink() else entry
        if found.is_dir():
            yield from _explore(path, above | {here})
        elif found.is_file():
            yield path
        elif found is path:
            yield Obstacle(path=path, reason="the symbolic link leads nowhere: restore its target or remove it")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder.

    Raises:
        OSError: The folder cannot be read.
    """
    with os.scandir(folder) as entries:
        return list(entries)


def _unreadable(error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"the folder cannot be read ({reason}): check its permissions"
