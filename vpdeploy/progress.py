"""How far something is, on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

DELAY_S = 2.0
"""What is done sooner shows no bar."""

_EVERY_S = 0.2
_WIDTH = 30
_COLUMNS = 80


class ProgressBar:
    """One line that is written over and over, from two seconds on; nothing where the stream is no terminal.

    Use it as a context manager: the line is taken away at the end.

    Args:
        title: Stands before the bar.
        stream: Where the bar is shown; None shows it on stderr.
        clock: Returns the time, in s.
    """

    def __init__(
        self, title: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started_at = clock()
        self._first_share: float | None = None
        self._shown_at: float | None = None
        self._line = ""
        self.on_terminal = self._stream.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown_at is not None:
            self._write("")

    def show(self, share: float, note: str = "") -> None:
        """Show how much is done, with the time that the rest will take; not more often than people can read.

        Args:
            share: The share that is done, from 0 to 1.
            note: Stands behind the bar.
        """
        if not self.on_terminal:
            return
        if self._first_share is None:
            self._first_share = share
        now = self._clock()
        if not self._is_due(now) and (share < 1 or now - self._started_at < DELAY_S):
            return
        self._shown_at = now
        filled = round(share * _WIDTH)
        parts = [f"{share:4.0%}", self._time_left(share, now - self._started_at), note]
        bar = f"{self._title} [{'#' * filled}{'.' * (_WIDTH - filled)}]"
        self._write(" ".join([bar, *filter(None, parts)]))

    def count(self, done: int, total: int | None = None) -> None:
        """Show how many things are done, where it is not known of how many without a bar.

        Args:
            done: How many are done.
            total: How many there are.
        """
        if total:
            self.show(done / total)
        elif self.on_terminal and self._is_due(self._clock()):
            self._shown_at = self._clock()
            self._write(f"{self._title} {done:,}")

    def _is_due(self, now: float) -> bool:
        """Tell whether it is time to write the line again."""
        is_next = self._shown_at is None or now - self._shown_at >= _EVERY_S
        return now - self._started_at >= DELAY_S and is_next

    def print_line(self, line: str) -> None:
        """Write a line that lasts, above the bar, which is drawn anew below it; nothing where there is no terminal.

        Args:
            line: Without a line break; unlike the bar it may be longer than the terminal is wide.
        """
        if not self.on_terminal:
            return
        taken_away = "" if self._shown_at is None else "\r\x1b[K"
        self._stream.write(f"{taken_away}{line}\n")
        self._stream.flush()
        if self._shown_at is not None:
            self._write(self._line)

    def _time_left(self, share: float, spent_s: float) -> str:
        """Return what the rest takes at the pace so far, of which a resumed work's first share is no part."""
        gained = share - (self._first_share or 0.0)
        if gained <= 0 or share >= 1:
            return ""
        minutes, seconds = divmod(round(spent_s * (1 - share) / gained), 60)
        hours, minutes = divmod(minutes, 60)
        return (f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}") + " left"

    def _write(self, line: str) -> None:
        """Replace the line by another, cut to the terminal's width: a longer one could not be taken back."""
        self._line = line
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except OSError:
            columns = _COLUMNS
        self._stream.write(f"\r{line[: columns - 1]}\x1b[K")
        self._stream.flush()
