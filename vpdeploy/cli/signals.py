"""SIGTERM and Ctrl-C end a verb in one way: what it does is unwound, what it wrote aside is cleared away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

from vpdeploy.cli.exits import INTERRUPTED

_SAME_SECONDS: Final = 0.5
"""Signals so close together are one: timeout(1), for one, sends it to the process and then to its whole group."""


class Stopped(Exception):  # noqa: N818 (no error: somebody wanted it)
    """What a verb raises that was told to stop and has something to say of it, such as how to go on."""


class Stop:
    """What raises ``KeyboardInterrupt`` at the first signal, and ends the process at once at the second."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._number: int | None = None
        self._at = 0.0

    @property
    def exit_code(self) -> int:
        """What shells know an interrupted process by: 128 and the signal's number."""
        return INTERRUPTED if self._number is None else 128 + self._number

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        is_first, now = self._number is None, time.monotonic()
        if os.getpid() == self._process and is_first:
            self._number, self._at = number, now
            raise KeyboardInterrupt
        # A forked child has inherited this; it ends as it would have without.
        if os.getpid() != self._process or now - self._at >= _SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Let SIGTERM and SIGINT raise ``KeyboardInterrupt`` in the block.

    A signal that the parent process has ignored, as nohup and background jobs do, or that somebody handles already is
    left alone. Outside the main thread nothing is changed, for Python takes signals there alone.
    """
    stop = Stop()
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, default in defaults.items():
            if signal.getsignal(number) == default:
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == stop.handle:
                signal.signal(number, handler)
