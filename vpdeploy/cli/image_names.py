"""The images that a command line names: files, folders, patterns, and lists on stdin."""

from __future__ import annotations

import glob
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Final

import typer

from vpdeploy.image import is_url, problem_of_place
from vpdeploy.tree import Obstacle, explore, is_hidden, is_image, natural_key

STDIN: Final = "-"
"""Stands for the paths on stdin."""

_ANY_DEPTH = "**"
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class NamedImage:
    """An image that was named, or a name that leads to none.

    Attributes:
        name: A path, or what was given instead of one.
        problem: Why there is no such image, and what to do; None where there is a file, which may still be no image.
    """

    name: str
    problem: str | None = None


def find_images(names: Iterable[str]) -> Iterator[NamedImage]:
    """Yield the images that arguments name, in their order.

    A folder stands for the images in it, at any depth, in natural order, and a pattern for those that it matches; both
    go by the endings of image files and pass over what is hidden. A file is taken whatever its ending. ``-`` stands
    for the paths on stdin, which are read as they are asked for; those may be folders, but are never patterns.

    Args:
        names: Paths, patterns and ``-``.
    """
    for name in names:
        if name == STDIN:
            for path in _paths_on_stdin():
                yield from _at(path)
        elif glob.has_magic(name) and not os.path.lexists(name) and not is_url(name):
            yield from _matching(name)
        else:
            yield from _at(name)


def read_paths(stream: BinaryIO) -> Iterator[str]:
    """Yield the paths of a list, one a line; or each ended by NUL, as ``find -print0`` writes them.

    Args:
        stream: Bytes in the file system's encoding. No path holds a NUL, so one among the first bytes tells which list
            it is.
    """
    separator, rest = b"", b""
    while chunk := _read_some(stream):
        rest += chunk
        if not separator:
            separator = b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b""
        *lines, rest = rest.split(separator) if separator else [rest]
        yield from filter(None, (_decode_path(line, separator) for line in lines))
    if path := _decode_path(rest, separator):
        yield path


def _paths_on_stdin() -> Iterator[str]:
    if sys.stdin is None:  # the shell closed it
        return
    if sys.stdin.isatty():
        typer.echo("type the images' paths, one a line, and Ctrl-D at the end", err=True)
    yield from read_paths(sys.stdin.buffer)


def _read_some(stream: BinaryIO) -> bytes:
    """Return what has come so far, and wait only if nothing has."""
    return stream.read1(_CHUNK_BYTES) if isinstance(stream, io.BufferedReader) else stream.read(_CHUNK_BYTES)


def _decode_path(line: bytes, separator: bytes) -> str:
    """Return the path of one line; where a list was made on Windows, a line ends in two characters."""
    return os.fsdecode(line if separator == b"\0" else line.removesuffix(b"\r"))


def _at(name: str) -> Iterator[NamedImage]:
    """Yield the image at a path, or those in the folder there."""
    path = Path(name)
    if os.path.isdir(path):  # noqa: PTH112  a name that is too long for a path is none, here
        yield from _below(path)
    elif problem := problem_of_place(path):
        yield NamedImage(name=name if is_url(name) else str(path), problem=problem)
    else:
        yield NamedImage(name=str(path))


def _below(folder: Path) -> Iterator[NamedImage]:
    """Yield the images in a folder, and what keeps from others."""
    found = [_named(each) for each in explore(folder) if isinstance(each, Obstacle) or is_image(each)]
    yield from sorted(found, key=_natural_name)
    if not found:
        yield NamedImage(name=str(folder), problem="the folder holds no images that are not hidden")


def _matching(pattern: str) -> Iterator[NamedImage]:
    """Yield the images that a pattern matches; ``**`` stands for folders at any depth."""
    parts = Path(pattern).parts
    if _ANY_DEPTH in parts:
        found = _matching_below(parts)
    else:
        paths = map(Path, glob.glob(pattern))  # noqa: PTH207  Path.glob takes no pattern that is absolute
        found = [_named(path) for path in paths if is_image(path) and not is_hidden(path) and path.is_file()]
    yield from sorted(found, key=_natural_name)
    if not found:
        hint = "" if _ANY_DEPTH in parts else "; **/ in a pattern looks into folders"
        yield NamedImage(name=pattern, problem=f"matches no image{hint}")


def _matching_below(pattern: Sequence[str]) -> list[NamedImage]:
    """Return the images that a pattern with ``**`` matches: ``glob`` would go round in links that lead upwards.

    Of what keeps from files, folders that cannot be read are named, for nobody knows what matches in them; links are
    where they match themselves.
    """
    depth = pattern.index(_ANY_DEPTH)
    start = str(Path(*pattern[:depth]))
    folders = [Path(name) for name in (glob.glob(start) if glob.has_magic(start) else [start])]  # noqa: PTH207
    found = []
    for folder in folders:
        for each in explore(folder) if folder.is_dir() else ():
            path = each.path if isinstance(each, Obstacle) else each
            fits = is_image(path) and _fits(path.relative_to(folder).parts, pattern[depth:])
            if fits or (isinstance(each, Obstacle) and not path.is_symlink()):
                found.append(_named(each))
    return found


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether a path's parts match a pattern's."""
    if not pattern:
        return not parts
    if pattern[0] == _ANY_DEPTH:
        return any(_fits(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _named(found: Path | Obstacle) -> NamedImage:
    if isinstance(found, Obstacle):
        return NamedImage(name=str(found.path), problem=found.reason)
    return NamedImage(name=str(found))


def _natural_name(image: NamedImage) -> tuple[list[tuple[int, int, str]], str]:
    return natural_key(image.name)
