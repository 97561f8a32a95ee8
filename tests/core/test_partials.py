from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpdeploy import files
from vpdeploy.files import write_atomically
from vpdeploy.partials import abandoned, abandoned_in, partial_file, partial_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks on folders are POSIX")


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("kind", ["partial_file", "partial_folder"])
def test_what_a_killed_process_was_writing_goes_with_the_next_write_and_not_before_the_kill(tmp_path: Path, kind: str):
    path = tmp_path / "result"
    program = (
        "import sys; from pathlib import Path; from vpdeploy import partials\n"
        f"with partials.{kind}(Path(sys.argv[1])) as partial: print(partial.name, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        name = writer.stdout.readline().decode().strip()
        write_atomically(path, b"meanwhile")
        assert names(tmp_path) == [name, "result"]
        assert abandoned(path) == abandoned_in(tmp_path) == []
        writer.kill()
    assert abandoned(path) == abandoned_in(tmp_path) == [tmp_path / name]
    write_atomically(path, b"afterwards")
    assert names(tmp_path) == ["result"]


def test_a_file_that_is_moved_into_the_place_of_a_sibling_is_being_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, real = tmp_path / "a", files._flush

    def flush(flushed: Path) -> None:
        assert abandoned(path) == []
        real(flushed)

    monkeypatch.setattr(files, "_flush", flush)
    (tmp_path / "whole").write_bytes(b"whole")
    with files.replacing_file(path) as temporary:
        (tmp_path / "whole").replace(temporary)
    assert path.read_bytes() == b"whole"


def test_a_sibling_that_is_taken_away_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    real, taken = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not taken:
            (other,) = tmp_path.iterdir()
            taken.append(other)
            other.rmdir() if other.is_dir() else other.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with partial_file(tmp_path / "a") as file:
        assert file.is_file()
    taken.clear()
    with partial_folder(tmp_path / "a") as folder:
        assert folder.is_dir()
    assert names(tmp_path) == []


def test_files_with_other_names_are_left_alone(tmp_path: Path):
    for name in (
        ".a.partial",
        ".a.b.abcdefgh.partial",
        "a.abcdefgh.partial",
        ".a.abcdefgh.partial.bak",
        ".b.abcdefgh.partial",
    ):
        (tmp_path / name).write_bytes(b"mine")
    os.mkfifo(tmp_path / ".a.12345678.partial")  # opening it must not wait
    before = names(tmp_path)
    write_atomically(tmp_path / "a", b"")
    assert set(before) - set(names(tmp_path)) == {".a.12345678.partial"}
