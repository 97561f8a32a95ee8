from __future__ import annotations

import io

import pytest

from vpdeploy.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What the line was, one time after the other."""
        return [line.removesuffix("\x1b[K") for line in self.getvalue().split("\r")[1:]]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_progress_is_shown_on_a_terminal_only(clock: Clock):
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        clock.now = 100.0
        with ProgressBar("measuring", stream=stream, clock=clock) as bar:
            clock.now += 3
            bar.show(0.5)
    assert pipe.getvalue() == ""
    assert terminal.lines == ["measuring [" + 15 * "#" + 15 * "." + "]  50%", ""]
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_takes_less_than_two_seconds_shows_nothing(clock: Clock):
    terminal = Terminal()
    with ProgressBar("measuring", stream=terminal, clock=clock) as bar:
        for share in (0.0, 0.5, 1.0):
            bar.show(share)
            clock.now += 0.9
    assert terminal.getvalue() == ""


def test_progress_is_not_shown_more_often_than_people_read(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("measuring", stream=terminal, clock=clock)
    clock.now += 10
    for step in range(100):
        clock.now += 0.01
        bar.show(step / 100)
    assert 4 <= len(terminal.lines) <= 6


def test_the_end_is_always_shown(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("measuring", stream=terminal, clock=clock)
    clock.now += 10
    bar.show(0.9)
    bar.show(1.0, "done")
    assert terminal.lines[-1] == "measuring [" + 30 * "#" + "] 100% done"


def test_the_rest_takes_as_long_as_the_pace_so_far_says(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("training", stream=terminal, clock=clock)
    bar.show(0.5)  # resumed
    for seconds, share in ((30, 0.75), (90, 0.8), (3690, 0.9)):
        clock.now = 100.0 + seconds
        bar.show(share, "loss 1")
    # 30 s for a quarter; 90 s for 0.3 of which 0.2 are left; 3690 s for 0.4 of which 0.1 is left
    assert [line.partition("% ")[2] for line in terminal.lines] == [
        "0:30 left loss 1",
        "1:00 left loss 1",
        "15:22 left loss 1",
    ]


def test_hours_are_told_as_hours(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("training", stream=terminal, clock=clock)
    bar.show(0.0)
    clock.now += 3723
    bar.show(0.5)
    assert terminal.lines == ["training [" + 15 * "#" + 15 * "." + "]  50% 1:02:03 left"]


def test_a_line_is_never_longer_than_the_terminal(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("building", stream=terminal, clock=clock)
    clock.now += 3
    bar.show(0.5, "x" * 200)
    assert len(terminal.lines[0]) == 79  # 80 columns where the terminal does not tell


def test_what_has_no_share_yet_says_what_it_does(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("measuring", stream=terminal, clock=clock)
    clock.now += 3
    bar.show(0.0, "warming up")
    assert terminal.lines[0].endswith("  0% warming up")


def test_nothing_is_cleared_that_was_not_shown(clock: Clock):
    terminal = Terminal()
    with ProgressBar("measuring", stream=terminal, clock=clock):
        pass
    assert terminal.getvalue() == ""


def test_things_of_an_unknown_number_are_counted(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("listing images", stream=terminal, clock=clock)
    bar.count(1)
    for seconds, done in ((3, 1_200), (3.1, 1_300), (3.3, 1_500)):
        clock.now = 100.0 + seconds
        bar.count(done)
    assert terminal.lines == ["listing images 1,200", "listing images 1,500"]


def test_things_of_a_known_number_have_a_bar(clock: Clock):
    terminal = Terminal()
    bar = ProgressBar("listing images", stream=terminal, clock=clock)
    clock.now += 3
    bar.count(5, 10)
    assert "50%" in terminal.lines[0]


def test_a_line_that_lasts_stands_above_the_bar(clock: Clock):
    terminal = Terminal()
    with ProgressBar("training", stream=terminal, clock=clock) as bar:
        bar.print_line("start: accuracy 0.5")
        clock.now += 3
        bar.show(0.5)
        bar.print_line("epoch 1: accuracy 0.6")
    drawn = "training [" + 15 * "#" + 15 * "." + "]  50% 0:03 left"
    assert terminal.getvalue() == (
        "start: accuracy 0.5\n"
        f"\r{drawn[: len(drawn) - 10]}\x1b[K"
        "\r\x1b[Kepoch 1: accuracy 0.6\n"
        f"\r{drawn[: len(drawn) - 10]}\x1b[K"
        "\r\x1b[K"
    )


def test_a_line_that_lasts_is_for_terminals_only(clock: Clock):
    pipe = io.StringIO()
    with ProgressBar("training", stream=pipe, clock=clock) as bar:
        bar.print_line("epoch 1: accuracy 0.6")
    assert pipe.getvalue() == ""
