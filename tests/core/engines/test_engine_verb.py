"""``vpdeploy build`` as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vpdeploy.cli.main import main
from vpdeploy.engines.toolkit import Toolkit

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def flowers(folded_flowers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(folded_flowers, tmp_path / "flowers.onnx"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vpdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def test_building_says_what_was_built_and_the_second_time_that_it_is_there(command: Run, flowers: Path, rtx: Toolkit):
    code, out, err = command("build", flowers, "--target", "sm_86,8.9", "--runtime", "tensorrt-rtx")
    assert (code, err) == (0, "")
    (engine,) = (flowers.parent / "engines").glob("*.engine")
    lines = out.splitlines()
    assert lines[0].startswith(f"{engine}: ")
    assert "built in" in lines[0]
    assert "sm_86 (RTX 30" in lines[1]
    assert lines[3] == "  holds    batch 1:8:32"
    before = engine.stat().st_mtime_ns
    code, out, err = command("build", flowers, "--target", "sm_86,sm_89", "--runtime", "tensorrt-rtx")
    assert (code, err) == (0, "")
    assert "is there already; --force builds it again" in out
    assert engine.stat().st_mtime_ns == before


def test_the_json_report_has_the_card_and_the_path(command: Run, zoo_copy: Path, rtx: Toolkit):
    code, out, _ = command("build", zoo_copy, "--target", "sm_89", "--slots", "1:4:8", "--batch", "2", "--json")
    report = json.loads(out)
    assert code == 0
    assert Path(report["path"]).is_file()
    assert report["built"] is True
    assert report["profile"]["slots"] == [1, 4, 8]
    assert report["profile"]["batch"] == [2, 2, 2]
    assert report["targets"] == ["sm_89"]
    assert (report["leftover"], report["removed"]) == ([], [])


def test_the_chosen_runtime_is_said_on_stderr(command: Run, flowers: Path, rtx: Toolkit):
    _, _, err = command("build", flowers, "--target", "sm_86")
    assert err.startswith("runtime tensorrt-rtx: ")


def test_engines_of_a_replaced_graph_are_reported_and_pruned(command: Run, flowers: Path, rtx: Toolkit):
    command("build", flowers, "--target", "sm_86")
    (old,) = (flowers.parent / "engines").glob("*.engine")
    flowers.write_bytes(flowers.read_bytes() + b"\x22\x00")  # an empty domain: another file, the same graph
    _, _, err = command("build", flowers, "--target", "sm_86")
    assert f"{old.name}: of a graph that is no longer here, or incomplete; left over, --prune removes it" in err
    assert old.is_file()
    code, _, err = command("build", flowers, "--target", "sm_86", "--prune")
    assert (code, old.exists()) == (0, False)
    assert "removed" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--target", "foo"), "error: --target foo: 'foo' is no GPU architecture"),
        (("--batch", "4:2:8"), "error: --batch 4:2:8: expected 1 <= MIN <= OPT <= MAX"),
        (("--target", "sm_86", "--slots", "3"), "error: --slots: a folded model has only --batch"),
        (("--target", "sm_90"), "has no target sm_90 (H100, H200); it has: sm_75"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_1(command: Run, flowers: Path, rtx: Toolkit, arguments, complaint):
    code, out, err = command("build", flowers, "--runtime", "tensorrt-rtx", *arguments)
    assert (code, out) == (1, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_a_failed_build_is_one_line_though_nvidias_library_prints_its_own(flowers: Path, rtx: Toolkit):
    arguments = [
        "build",
        str(flowers),
        "--target",
        "sm_75",
        "--runtime",
        "tensorrt-rtx",
    ]  # float32 has no kernels there
    finished = subprocess.run(
        [sys.executable, "-m", "vpdeploy", *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert finished.stderr.startswith("error: TensorRT-RTX ")


INTERRUPTED_BY = {
    "the parser's log": """
    from vpdeploy.engines import toolkit
    made = toolkit._logger_of
    def logger_of(module, keep):
        logger = made(module, keep)
        log = type(logger).log
        def interrupt(self, severity, msg):
            once(); log(self, severity, msg)
        type(logger).log = interrupt
        return logger
    toolkit._logger_of = logger_of
    """,
    "the builder's first phase": """
    from vpdeploy.engines import progress
    started = progress.BuildProgress.start
    def start(self, name, parent, steps):
        once(); started(self, name, parent, steps)
    progress.BuildProgress.start = start
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
@pytest.mark.parametrize("moment", INTERRUPTED_BY)
def test_ctrl_c_ends_a_build_with_nothing_written(flowers: Path, rtx: Toolkit, moment: str):
    """The child sends itself the signal from inside NVIDIA's code; exit code 130 is the shell's for an interrupt.

    A background job inherits the signal as ignored: the child takes it back first.
    """
    program = f"""
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent = []
    def once():
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
    {INTERRUPTED_BY[moment]}
    sys.argv[0] = "vpdeploy"
    from vpdeploy.cli.main import main
    main()
    """
    arguments = ["build", str(flowers), "--target", "sm_86", "--runtime", "tensorrt-rtx"]
    source = "\n".join(line[4:] for line in program.splitlines())
    finished = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert (finished.returncode, finished.stdout) == (130, ""), finished.stderr
    assert finished.stderr == "stopped; nothing was written\n"
    assert not (flowers.parent / "engines").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_a_terminal_gets_a_progress_bar_and_a_pipe_none(flowers: Path, rtx: Toolkit):
    import pty

    arguments = [sys.executable, "-m", "vpdeploy", "build", str(flowers), "--target", "sm_86"]
    quiet = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert (quiet.returncode, "building" in quiet.stderr) == (0, False)
    master, slave = pty.openpty()
    # The toy is built in less time than a bar waits for.
    program = "from vpdeploy import progress; progress.DELAY_S = 0; from vpdeploy.cli.main import main; main()"
    forced = [sys.executable, "-c", program, *arguments[3:], "--force"]
    with subprocess.Popen(forced, stderr=slave, stdout=subprocess.DEVNULL) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
    os.close(master)
    assert process.returncode == 0
    assert b"building" in shown
    assert b"100%" in shown
