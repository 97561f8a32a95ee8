"""How a verb ends that is told to: by SIGTERM, by Ctrl-C, once or again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vpdeploy.cli.signals import stopping

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")

PROGRAM = """
import os, signal, sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
from vpdeploy.cli import main, signals
from vpdeploy.files import creating_folder, replacing_file
from vpdeploy.inspection import report

def send(number):
    os.kill(os.getpid(), number)

def work(path):
    with creating_folder(Path("folder")), replacing_file(Path("file")):
        {work}

report.inspect_path = work
sys.argv = ["vpdeploy", "inspect", "x", "--json"]
{before}
main.main()
"""


def run(tmp_path: Path, work: str, before: str = "") -> int:
    """Return the exit code of a verb that does what is given while it writes; negative: killed by that signal."""
    return finish(tmp_path, work, before).returncode


def finish(tmp_path: Path, work: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a verb that does what is given while it writes."""
    lines = textwrap.dedent(work).strip().split("\n")
    source = PROGRAM.format(work="\n        ".join(lines), before=before)
    finished = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in finished.stderr
    return finished


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_verb_with_its_code_and_leaves_nothing_half_written(tmp_path: Path, number: int, code: int):
    finished = finish(tmp_path, f"send({int(number)})")
    assert finished.returncode == code
    assert finished.stderr.strip() == "stopped; nothing was written"
    fields = {"kind": "Stopped", "message": "stopped; nothing was written", "exit_code": code}
    assert json.loads(finished.stdout) == {"error": fields}
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_before_is_named_and_what_lay_aside_is_not(tmp_path: Path):
    work = """
    with replacing_file(Path("done.csv")):
        pass
    for number in range(3):
        with creating_folder(Path(f"zoo{number}")) as aside, replacing_file(aside / "inner"):
            pass
    send(15)
    """
    finished = finish(tmp_path, work)
    assert finished.returncode == 143
    assert finished.stderr.strip() == "stopped; written before: done.csv, zoo0, zoo1 and 1 more"


def test_two_signals_at_once_are_one(tmp_path: Path):
    twice = "try:\n    send(15)\nfinally:\n    send(15)"
    assert run(tmp_path, twice, before="signals._SAME_SECONDS = 3600") == 143
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path):
    twice = "try:\n    send(15)\nfinally:\n    send(15)"
    assert run(tmp_path, twice, before="signals._SAME_SECONDS = 0") == -signal.SIGTERM


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path: Path):
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert run(tmp_path, "send(2)\nraise SystemExit(7)", before=ignored) == 7
    assert run(tmp_path, "send(2)\nsend(15)", before=ignored) == 143


def test_a_forked_child_ends_as_without(tmp_path: Path):
    work = """
    child = os.fork()
    if not child:
        send(15)
        os._exit(3)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 100)
    """
    assert run(tmp_path, work) == 100 - signal.SIGTERM


def test_the_handlers_of_a_program_are_as_they_were_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with stopping():
        pass
    assert [signal.getsignal(number) for number in numbers] == before
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with stopping():
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, mine)
