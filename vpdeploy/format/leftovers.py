"""What lies in a bundle's folder and belongs to it no more: what kills left, and what was replaced or withdrawn.

Whoever removes any of it holds the bundle's lock, so nobody is writing it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpdeploy.files import link_target
from vpdeploy.format.holds import graph_name, held, version_name
from vpdeploy.format.manifest import ENGINES_FOLDER, TASKS_FOLDER, VERSION_NAME, Manifest
from vpdeploy.partials import abandoned, abandoned_in, remove

_WRITTEN_GRAPH = re.compile(r"model(\.[0-9a-f]{12})?\.onnx")
_WRITTEN_DATA = re.compile(r"model\.[^/]*\.data")
_PARTIAL = re.compile(r"\.(manifest\.json|model\..*)\..*\.partial")


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A file or folder that the manifest does not name.

    Attributes:
        path: Where it lies.
        size_bytes: The size of its files.
        is_held: Whether a running process holds it, so that it has to stay.
    """

    path: Path
    size_bytes: int
    is_held: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form."""
        return {"path": str(self.path), "size_bytes": self.size_bytes}


def find_leftovers(path: Path, manifest: Manifest) -> list[Leftover]:
    """Return what a bundle's manifest does not name: graphs, data files, versions, and what was half written.

    Files that have other names than vpdeploy gives are the user's, and none of them.

    Args:
        path: The bundle, whose lock is held.
        manifest: Its manifest.
    """
    found = dict(_unnamed(path, manifest))
    in_use = held(path, [name for name in found.values() if name is not None])
    return [
        Leftover(path=each, size_bytes=_size_bytes(each), is_held=name in in_use)
        for each, name in sorted(found.items())
    ]


def remove_leftovers(path: Path, manifest: Manifest) -> list[Leftover]:
    """Remove what a bundle's manifest does not name and nobody holds; what cannot be removed stays.

    Args:
        path: The bundle, whose lock is held.
        manifest: Its manifest.

    Returns:
        What was found.
    """
    found = find_leftovers(path, manifest)
    for leftover in found:
        if not leftover.is_held:
            remove(leftover.path)
    for folder in (path / TASKS_FOLDER).glob("*"):
        if folder.name not in manifest.tasks:
            with contextlib.suppress(OSError):  # it is not empty: a version is held, or files are the user's
                folder.rmdir()
    return found


def _unnamed(path: Path, manifest: Manifest) -> Iterator[tuple[Path, str | None]]:
    """Yield every leftover with the name of the hold that may be on it, None of what was never whole."""
    named = {manifest.graph_file, None if manifest.graph_data is None else manifest.graph_data.name}
    for file in path.iterdir():
        if _PARTIAL.fullmatch(file.name):
            yield file, None
        elif (_WRITTEN_GRAPH.fullmatch(file.name) or _WRITTEN_DATA.fullmatch(file.name)) and file.name not in named:
            yield file, graph_name(file.name)
    for each in (*abandoned(link_target(path)), *abandoned_in(path / ENGINES_FOLDER)):
        yield each, None
    for folder in (path / TASKS_FOLDER).glob("*/*"):
        task = folder.parent.name
        kept = manifest.tasks[task].files if task in manifest.tasks else {}
        if folder.name.startswith(".") and folder.name.endswith(".partial"):
            yield folder, None
        elif VERSION_NAME.fullmatch(folder.name) and int(folder.name) not in kept:
            yield folder, version_name(task, int(folder.name))


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    sizes = 0
    for file in files:
        with contextlib.suppress(OSError):
            sizes += file.lstat().st_size if not file.is_dir() else 0
    return sizes
