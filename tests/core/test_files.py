from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vpdeploy import files
from vpdeploy.files import (
    creating_folder,
    locked,
    replacing_file,
    replacing_folder,
    sha256_of_file,
    storage_reason,
    write_atomically,
)


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


# --- links, rooms and things in the way ---


def write(path: Path) -> None:
    write_atomically(path, b"new")


def make(path: Path) -> None:
    with creating_folder(path) as temporary:
        (temporary / "a").write_bytes(b"new")


def remake(path: Path) -> None:
    with replacing_folder(path) as temporary:
        (temporary / "a").write_bytes(b"new")


def test_a_link_to_a_file_is_written_through(tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(Path("far") / "file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == b"new"
    assert (names(tmp_path), names(tmp_path / "far")) == (["far", "link"], ["file"])


@pytest.mark.parametrize("write_to", [write, make, remake])
def test_a_link_that_leads_nowhere_makes_what_it_leads_to(tmp_path: Path, write_to: Callable[[Path], None]):
    (tmp_path / "link").symlink_to(tmp_path / "far" / "target")
    write_to(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "far") == ["target"]


def test_a_folder_on_the_way_may_be_a_link_that_leads_nowhere(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "far" / "target")
    with pytest.raises(RuntimeError), replacing_file(tmp_path / "link" / "file"):
        raise RuntimeError
    assert names(tmp_path) == ["link"]
    write(tmp_path / "link" / "file")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "far" / "target") == ["file"]


@pytest.mark.parametrize("write_to", [make, remake])
def test_a_link_to_a_folder_is_written_through(tmp_path: Path, write_to: Callable[[Path], None]):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_to(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "target") == ["a"]
    assert names(tmp_path) == ["link", "target"]


@pytest.mark.parametrize("write_to", [write, make, remake])
def test_links_in_a_circle_are_refused_by_name(tmp_path: Path, write_to: Callable[[Path], None]):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links") as refused:
        write_to(tmp_path / "a")
    assert refused.value.filename == str(tmp_path / "a")
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="is not a file, so it is not replaced"):
            write(tmp_path / name)
    assert names(tmp_path) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_lock_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(OSError, match="in the place of a lock file"), locked(place):
            pass


ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@pytest.mark.parametrize("number", ROOM)
@pytest.mark.parametrize("write_to", [write, make, remake])
def test_want_of_room_names_the_path_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, write_to: Callable[[Path], None]
):
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "a" / "b" / "target"
    with pytest.raises(OSError, match=r".") as refused:
        write_to(path)
    assert refused.value.filename == str(path)
    assert storage_reason(refused.value)
    assert names(tmp_path) == []


def test_of_two_files_that_are_written_together_the_one_without_room_is_named(tmp_path: Path):
    outer, inner = replacing_file(tmp_path / "outer"), replacing_file(tmp_path / "inner")
    with pytest.raises(OSError, match="inner"), outer, inner:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_an_error_that_is_not_for_want_of_room_is_as_it_was(tmp_path: Path):
    with pytest.raises(PermissionError) as refused, replacing_file(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no", "elsewhere")
    assert refused.value.filename == "elsewhere"
    assert storage_reason(refused.value) is None


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is of POSIX")
def test_a_file_above_the_limit_of_the_process_is_one_error_that_names_it(tmp_path: Path):
    program = (
        "import resource, sys; from pathlib import Path; from vpdeploy.files import storage_reason, write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_atomically(Path(sys.argv[1]), b'0' * 5000)\n"
        "except OSError as error:\n"
        "    print(error.filename, '|', storage_reason(error))\n"
    )
    path = tmp_path / "new" / "file"
    found = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert found.stdout == f"{path} | a file may not be that large here (see ulimit -f)\n"
    assert names(tmp_path) == []


def test_a_lock_that_made_its_folder_goes_with_it_after_an_error_and_only_then(tmp_path: Path):
    path = tmp_path / "engines" / "lock"
    with pytest.raises(RuntimeError), locked(path):
        raise RuntimeError
    assert names(tmp_path) == []
    with locked(path):
        pass
    with pytest.raises(RuntimeError), locked(path):
        raise RuntimeError
    assert names(path.parent) == ["lock"]


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path):
    """Whoever waited for the removed file must not hold it beside one who made a new one."""
    path = tmp_path / "lock"
    order: list[str] = []

    def follow() -> None:
        with locked(path):
            order.append("second")
            with pytest.raises(BlockingIOError), locked(path, wait=False):
                pass

    follower = threading.Thread(target=follow)
    with locked(path):
        follower.start()
        follower.join(0.05)
        path.unlink()
        order.append("first")
    follower.join(60)
    assert order == ["first", "second"]
