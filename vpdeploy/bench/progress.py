"""How far a benchmark is, on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

_EVERY_S = 0.2
_WIDTH = 30


class ProgressLine:
    """One line that is written over and over; nothing where the stream is no terminal.

    Args:
        stream: Normally stderr.
        clock: Returns the time, in s.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream if stream.isatty() else None
        self._clock = clock
        self._shown_at: float | None = None

    def show(self, share: float) -> None:
        """Show the share that is done, from 0 to 1; not more often than people can read."""
        now = self._clock()
        if self._stream is None or (self._shown_at is not None and now - self._shown_at < _EVERY_S):
            return
        self._shown_at = now
        filled = round(share * _WIDTH)
        state = f"{share:4.0%}" if share else "warming up"
        self._stream.write(f"\rmeasuring [{'#' * filled}{'.' * (_WIDTH - filled)}] {state}\x1b[K")
        self._stream.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._stream is not None and self._shown_at is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
