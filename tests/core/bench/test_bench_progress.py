from __future__ import annotations

import io

from vpdeploy.bench.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_shown_on_a_terminal_only():
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        line = ProgressLine(stream, Clock())
        line.show(0.5)
        line.clear()
    assert pipe.getvalue() == ""
    assert " 50%" in terminal.getvalue()
    assert terminal.getvalue().count("#") == 15
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_progress_is_not_shown_more_often_than_people_read():
    terminal, clock = Terminal(), Clock()
    line = ProgressLine(terminal, clock)
    for step in range(100):
        clock.now = step * 0.01
        line.show(step / 100)
    assert 4 <= terminal.getvalue().count("measuring") <= 6


def test_warming_up_has_no_share():
    terminal = Terminal()
    ProgressLine(terminal, Clock()).show(0.0)
    assert "warming up" in terminal.getvalue()


def test_nothing_is_cleared_that_was_not_shown():
    terminal = Terminal()
    ProgressLine(terminal, Clock()).clear()
    assert terminal.getvalue() == ""
