"""What running processes hold of a bundle, so that nobody removes it from under them.

A session holds the graph and the versions that it serves, from before it reads them until their last request is
answered. A hold is a shared lock on one byte of the bundle's file ``.holds``, at the place that the held thing's name
gives. The operating system ends it with the process, also after a kill; who holds needs no right to write, and one open
file does for a thousand tasks. Two names at one place would only keep a thing for longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

HOLDS_FILE = ".holds"

_FLOCK = "hhqqi0q"
"""C's ``struct flock``: type, whence, start, length, process."""


class Holds:
    """What one session holds. Every method may be called from any thread.

    Args:
        folder: The bundle. Without its file ``.holds``, which every writer makes, or without such locks (outside of
            Linux, and on some network file systems) nothing is held.
        names: Returns what is to be held now, from ``graph_name`` and ``version_name``.
    """

    def __init__(self, folder: Path, names: Callable[[], Iterable[str]]) -> None:
        self._path = folder / HOLDS_FILE
        self._names = names
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._held: set[str] = set()
        self._is_closed = False

    def refresh(self) -> None:
        """Hold what is to be held now, and that alone."""
        with self._lock:
            if self._is_closed:
                return
            if self._descriptor is None:
                self._descriptor = _opened(self._path)
            wanted = set(self._names())
            for name in wanted - self._held:
                _lock_place(self._descriptor, name, shared=True)
            for name in self._held - wanted:
                _lock_place(self._descriptor, name, shared=False)
            self._held = wanted if self._descriptor is not None else set()

    def close(self) -> None:
        """Hold nothing any more; may be called again."""
        with self._lock:
            self._is_closed = True
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None


def graph_name(file: str) -> str:
    """Return what the hold on a graph, or on its data file, is called."""
    return file


def version_name(task: str, version: int) -> str:
    """Return what the hold on a task's version is called."""
    return f"{task}/{version}"


def held(folder: Path, names: Iterable[str]) -> set[str]:
    """Return those names that a running process, or this one, holds."""
    descriptor = _opened(folder / HOLDS_FILE)
    if descriptor is None:
        return set()
    try:
        return {name for name in names if _is_held(descriptor, name)}
    finally:
        os.close(descriptor)


def make_holds_file(folder: Path) -> None:
    """Make the file that holds are locks on, where it is not there; a folder that cannot be written stays without."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder / HOLDS_FILE, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644))


def _opened(path: Path) -> int | None:
    """Open the file of holds; None where there is none, or something else."""
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def _place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _lock_place(descriptor: int | None, name: str, *, shared: bool) -> None:
    """Take a shared lock on a name's place, or give it up; a file system without locks has none."""
    if sys.platform == "linux" and descriptor is not None:
        import fcntl

        kind = fcntl.F_RDLCK if shared else fcntl.F_UNLCK
        with contextlib.suppress(OSError):
            # Locks of the open file, not of the process: closing another descriptor of the file must not end them.
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, _place(name), 1, 0))


def _is_held(descriptor: int, name: str) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _place(name), 1, 0)
    try:
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    except OSError:
        return False
    return bool(struct.unpack_from("h", found)[0] != fcntl.F_UNLCK)
