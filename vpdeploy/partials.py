"""Hidden siblings that are going to be a file or a folder, and those that killed processes left behind.

Who writes one holds a lock on it, which the operating system ends with the process: one that can be locked is nobody's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".partial"


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield an empty hidden file beside ``path``; if it is still there after the block, it is removed.

    Raises:
        OSError: The folder cannot be written.
    """
    remove_abandoned(path)
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), suffix=SUFFIX, dir=path.parent)
        file = Path(name)
        if _claim(descriptor, file):
            break
        os.close(descriptor)
    if sys.platform == "win32":  # which renames no file that is open
        os.close(descriptor)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)
        if sys.platform != "win32":
            os.close(descriptor)


@contextlib.contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``path``; if it is still there after the block, it is removed.

    Raises:
        OSError: The folder above cannot be written.
    """
    remove_abandoned(path)
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=SUFFIX, dir=path.parent))
            descriptor = _opened(folder)
            if descriptor is None:
                break
            if _claim(descriptor, folder):
                stack.callback(os.close, descriptor)
                break
            os.close(descriptor)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a file that was moved to the place of a hidden sibling, unless it is locked, for the length of the block."""
    descriptor = None if sys.platform == "win32" else _opened(path)
    try:
        if sys.platform != "win32" and descriptor is not None:
            import fcntl

            with contextlib.suppress(OSError):  # it is the sibling itself, or the file system has no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def abandoned(path: Path) -> list[Path]:
    """Return the hidden files and folders that processes left beside ``path`` which are no longer there."""
    return abandoned_in(path.parent, prefix=_prefix(path))


def abandoned_in(folder: Path, *, prefix: str | None = None) -> list[Path]:
    """Return the hidden files and folders that processes left in a folder which are no longer there.

    Args:
        folder: The folder; it need not be there.
        prefix: How their names begin; None takes them all.
    """
    beginning = r"\..*\." if prefix is None else re.escape(prefix)
    name = re.compile(beginning + r"[a-z0-9_]{8}" + re.escape(SUFFIX))  # what tempfile adds
    try:
        found = sorted(each for each in folder.iterdir() if name.fullmatch(each.name))
    except OSError:  # there is no such folder, or it cannot be listed
        return []
    return [each for each in found if _is_abandoned(each)]


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left beside ``path`` while they were writing it; what cannot be removed stays."""
    for each in abandoned(path):
        remove(each)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _opened(path: Path) -> int | None:
    """Open a file or a folder to lock it; None where that cannot be done."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags)
    except OSError:
        return None


def _is_abandoned(path: Path) -> bool:
    """Tell whether nobody writes a hidden sibling any more; where that cannot be known, somebody may."""
    if sys.platform == "win32" or (descriptor := _opened(path)) is None:
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # somebody does, or the file system has no locks
        return False
    finally:
        os.close(descriptor)


def _claim(descriptor: int, path: Path) -> bool:
    """Lock a sibling that was just made; tell whether it is still there: another may have taken it for abandoned."""
    if sys.platform == "win32":
        return True
    import fcntl

    with contextlib.suppress(OSError):  # the file system has no locks, so nobody takes it for abandoned
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
