"""Files and folders that are wholly there or not at all, and the lock of those who change them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vpdeploy.partials import claimed, partial_file, partial_folder

_RETRY_S = 0.1

_notes: list[list[Path]] = []
"""Who wants to know of every file and folder that is put in its place."""


@contextlib.contextmanager
def noting_results() -> Iterator[list[Path]]:
    """Yield a list that every file and folder which this module puts in its place within the block is added to."""
    noted: list[Path] = []
    _notes.append(noted)
    try:
        yield noted
    finally:
        _notes.remove(noted)


def _note(path: Path) -> None:
    for noted in _notes:
        noted.append(path)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at ``path`` by ``data`` so that a crash leaves the old file or the new one.

    The bytes go to a temporary sibling first, are flushed to the disk, and are renamed into place.

    Raises:
        OSError: The folder cannot be written or the disk is full; the old file is untouched.
    """
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that replaces it when the block succeeds.

    If the block raises, the sibling is deleted, with the folders that were made for it, and ``path`` is as it was. A
    sibling that a killed process left is deleted by the next that writes there. A link is written through: the file
    that it leads to is replaced, the link stays.

    Raises:
        OSError: The folder cannot be written, the disk is full, or ``path`` is something else than a file; it is named.
    """
    path = link_target(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "exists and is not a file, so it is not replaced", str(path))
    with making_parents(path), naming_storage_errors(path), partial_file(path) as temporary:
        yield temporary
        with claimed(temporary):  # the block may have put another file in its place
            temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
            temporary.replace(path)
        _note(path)
        _flush(path.parent)


@contextlib.contextmanager
def creating_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` when the block succeeds.

    If the block raises, the sibling is deleted, with the folders that were made for it. ``path`` must not exist, or be
    an empty folder, or a link to one of these, which stays a link.

    Raises:
        OSError: The folder cannot be made, or the disk is full; ``path`` is named.
    """
    path = link_target(path)
    with making_parents(path), naming_storage_errors(path), partial_folder(path) as temporary:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        _flush(temporary)
        temporary.rename(path)
        _note(path)
        _flush(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of ``path`` when the block succeeds.

    If the block raises, the sibling is deleted and ``path`` is as it was. A folder cannot be renamed over another one:
    between two renames there is none for an instant, and a process killed just then leaves the old one hidden.
    """
    path = link_target(path)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    with naming_storage_errors(path), creating_folder(new) as temporary:
        yield temporary
    try:
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
            _note(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _flush(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def link_target(path: Path) -> Path:
    """Return the path that a write to ``path`` reaches: where a link leads, else ``path`` itself.

    Raises:
        OSError: The link leads in a circle.
    """
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


@contextlib.contextmanager
def making_parents(path: Path) -> Iterator[None]:
    """Make the folders that ``path`` lies in; if the block raises, those that were made and are empty go again.

    Where one is a link that leads nowhere, the folder that it should lead to is made.
    """
    parent = Path(os.path.realpath(path.parent))
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()
        raise


_STORAGE_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not be that large here (see ulimit -f)",
}


def storage_reason(error: OSError) -> str | None:
    """Return, in words, that there is no room for what was to be written; None where something else is wrong."""
    return _STORAGE_REASONS.get(error.errno or 0)


def describe_error(error: OSError) -> str:
    """Return an error of the operating system in words: which file, and what is wrong."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


@contextlib.contextmanager
def naming_storage_errors(path: Path) -> Iterator[None]:
    """Let an error for want of room name ``path``: a write that fails names no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename).parts if isinstance(error.filename, str) else ()
        is_temporary = any(part.startswith(f".{path.name}.") for part in named)
        if storage_reason(error) is not None and (is_temporary or not named):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file for the length of the block: one holder at a time, of all threads and processes.

    The operating system frees it when its holder ends, even by a kill. The file is made if it is not there, and stays,
    unless its folder was made for it and the block raises; it is never truncated, for it may be a link to another file.

    Args:
        path: The lock file.
        wait: Wait until another holder has freed it; otherwise raise.

    Raises:
        BlockingIOError: Another holds it, and ``wait`` is False.
        OSError: The file cannot be made, or is something else than a file.
    """
    is_new = not path.parent.exists()
    with making_parents(path), _acquired(path, wait=wait) as file:
        try:
            yield
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # Windows removes no file that is open
                    path.unlink()
            raise
        finally:
            _free(file)


@contextlib.contextmanager
def _acquired(path: Path, *, wait: bool) -> Iterator[IO[bytes]]:
    """Yield the lock file, locked: the one that lies at the path, not one that its last holder has removed."""
    while True:
        with _opened_lock(path) as file:
            while not _take(file, wait=wait):
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
                time.sleep(_RETRY_S)
            if _lies_at(file, path):
                yield file
                return
        path.parent.mkdir(parents=True, exist_ok=True)


def _opened_lock(path: Path) -> IO[bytes]:
    """Open a lock file, or make it; what is no file, such as a named pipe, could keep a reader waiting for ever."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is in the place of a lock file and is none; remove it", str(path))
    return os.fdopen(os.open(path, flags, 0o666), "ab")


def _lies_at(file: IO[bytes], path: Path) -> bool:
    """Tell whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(file: IO[bytes], *, wait: bool) -> bool:
    """Lock a file; return whether it was free. Only POSIX can wait for as long as it takes."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:  # what Windows says of a lock that is held
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free(file: IO[bytes]) -> None:
    """Unlock a file. Closing it is not enough: a process that was forked meanwhile holds it open too."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)


def _flush(path: Path) -> None:
    """Flush a file's or a folder's data to the disk, where the platform lets a folder be opened."""
    flags = os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # Windows does not open folders; the rename is still atomic there
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the process's file mode mask: temporary files are born private, results should not be."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
