from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vpdeploy import files
from vpdeploy.files import creating_folder, locked, replacing_file, replacing_folder, sha256_of_file, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path: Path):
    # The digest of "abc" is an example in FIPS 180-2.
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing_file(path) as temporary:
            temporary.write_bytes(b"ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    flush, rename = files._flush, Path.replace

    def noted_flush(path: Path) -> None:
        steps.append("flush folder" if path == tmp_path else "flush file")
        flush(path)

    def noted_rename(source: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(source, target)

    monkeypatch.setattr(files, "_flush", noted_flush)
    monkeypatch.setattr(Path, "replace", noted_rename)
    write_atomically(tmp_path / "file", b"new")
    assert steps == ["flush file", "rename", "flush folder"]


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "folder"

    def write_half() -> None:
        with creating_folder(path) as temporary:
            (temporary / "a").write_bytes(b"a")
            assert not path.exists()
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert names(tmp_path) == []
    with creating_folder(path) as temporary:
        (temporary / "a").write_bytes(b"a")
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["a"]


def test_a_folder_replaces_an_empty_one_only(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with creating_folder(tmp_path / "empty") as temporary:
        (temporary / "a").touch()
    assert names(tmp_path / "empty") == ["a"]
    with pytest.raises(OSError, match="not empty"), creating_folder(tmp_path / "empty") as temporary:
        (temporary / "b").touch()
    assert names(tmp_path / "empty") == ["a"]
    assert names(tmp_path) == ["empty"]


def test_results_are_readable_as_the_umask_says(tmp_path: Path):
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
        with creating_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    path = tmp_path / "new" / "folder"
    for name in ("a", "b"):
        with replacing_folder(path) as temporary:
            (temporary / name).write_bytes(b"")
    assert names(path) == ["b"]
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("step", ["while writing", "rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
):
    path, rename = tmp_path / "folder", Path.rename
    if existing:
        path.mkdir()
        (path / "old").write_bytes(b"old")

    def fail_at_last(source: Path, target: Path) -> Path:
        if target == path and "new" in source.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(source, target)

    def replace() -> None:
        with replacing_folder(path) as temporary:
            (temporary / "new").write_bytes(b"new")
            if step == "while writing":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", fail_at_last)
    with pytest.raises(OSError, match="No space left" if step == "while writing" else "Permission denied"):
        replace()
    assert names(tmp_path) == (["folder"] if existing else [])
    if existing:
        assert (path / "old").read_bytes() == b"old"


# --- locks ---


@pytest.fixture(params=["posix", "windows"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """POSIX's locks, and Windows' as its documentation says that they answer."""
    if request.param == "windows":
        fcntl = pytest.importorskip("fcntl")
        windows = ModuleType("msvcrt")
        windows.LK_NBLCK, windows.LK_UNLCK = 2, 0

        def locking(descriptor: int, mode: int, count: int) -> None:
            assert (os.lseek(descriptor, 0, os.SEEK_CUR), count) == (0, 1)  # a range from where the file stands
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if mode == windows.LK_NBLCK else fcntl.LOCK_UN)
            except BlockingIOError:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None

        windows.locking = locking
        monkeypatch.setitem(sys.modules, "msvcrt", windows)
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(files, "_RETRY_S", 0.001)
    yield request.param
    monkeypatch.undo()


def test_a_lock_that_is_held_is_not_given_out_again(tmp_path: Path, platform: str):
    path = tmp_path / "new" / "lock"
    with locked(path):
        with pytest.raises(BlockingIOError, match="holds the lock"), locked(path, wait=False):
            pass
        with locked(tmp_path / "other", wait=False):
            pass
    with locked(path, wait=False):
        pass


def test_a_lock_is_waited_for(tmp_path: Path, platform: str):
    path = tmp_path / "lock"
    order: list[str] = []
    asks = threading.Event()

    def follow() -> None:
        asks.set()
        with locked(path):
            order.append("second")

    follower = threading.Thread(target=follow)
    with locked(path):
        follower.start()
        assert asks.wait(60)
        follower.join(0.05)
        order.append("first")
    follower.join(60)
    assert order == ["first", "second"]


def test_a_lock_is_free_after_an_error(tmp_path: Path, platform: str):
    path = tmp_path / "lock"
    with pytest.raises(RuntimeError, match="broken"), locked(path):
        raise RuntimeError("broken")
    with locked(path, wait=False):
        pass


def test_a_killed_process_frees_its_lock(tmp_path: Path):
    path = tmp_path / "lock"
    code = (
        "import pathlib, sys\n"
        "from vpdeploy.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        process.kill()
        process.wait()
        with locked(path, wait=False):
            pass


def test_what_a_lock_file_holds_or_links_to_is_left_alone(tmp_path: Path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "precious").read_bytes() == b"precious"
