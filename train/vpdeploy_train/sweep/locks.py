"""Locks that the operating system releases when their process dies, however it dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class FileLock:
    """An exclusive lock on a file, held from ``acquire`` to ``release`` or the end of the process.

    Where the platform has no ``fcntl`` (Windows) nothing is locked: one worker only.

    Args:
        path: The file; it is created, and stays.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock; without ``wait``, tell whether it was free."""
        try:
            import fcntl
        except ImportError:
            return True
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Give the lock back; it cannot be taken again."""
        self._stream.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock for the time of the context, after waiting for it."""
    lock = FileLock(path)
    try:
        lock.acquire(wait=True)
        yield
    finally:
        lock.release()
