"""The watchdog: what hangs is noticed, what waits for it is refused, and the process ends rather than hang with it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from vpdeploy.serving.pulse import Pulse

_log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""Time between two looks."""

_DOUBTFUL_FAILURES = 3
"""Batches that fail in a row before the server is called unready."""

_PROBE_S = 5.0
"""How often, while batches fail, one image is run to see whether they still do: perhaps nobody sends any."""

_LAST_WORDS_S = 1.0
"""How long writing the last log line may take: stderr may be what hangs."""


class _Patient:
    """One thing that is watched: for how long it has stood still, and for how long its runs have failed."""

    def __init__(self, read: Callable[[], Pulse]) -> None:
        self._read = read
        self._mark = 0
        self._still_s = 0.0
        self._failing_s = 0.0
        self.failures = 0

    def look(self, passed_s: float, stall_s: float) -> tuple[str | None, str | None]:
        """Return what is wrong for good, and what may be, ``passed_s`` after the last look."""
        pulse = self._read()
        stands_still = pulse.is_busy and pulse.mark == self._mark
        self._still_s = self._still_s + passed_s if stands_still else 0.0
        self._failing_s = self._failing_s + passed_s if pulse.failures >= _DOUBTFUL_FAILURES else 0.0
        self._mark, self.failures = pulse.mark, pulse.failures

        standstill = f"work has stood still for {self._still_s:.0f} s {pulse.place}"
        failing = f"the last {pulse.failures} batches failed"
        if pulse.fault is not None:
            return pulse.fault, None
        if self._still_s >= stall_s:
            return standstill, None
        if self._failing_s >= stall_s:
            return f"{failing}, for {self._failing_s:.0f} s", None
        if self._failing_s:
            return None, failing
        return None, standstill if self._still_s >= stall_s / 2 else None


class Watchdog:
    """Looks four times a second whether work moves on.

    What stands still for half of ``stall_s``, and batches that fail again and again, make the server unready. What
    stands still or fails for all of it, and a thread that has ended, are a fault, which is never taken back.

    A look that comes late counts as one that came in time: a process that was stopped and continued has not stalled.

    Args:
        pulses: Each tells how one group of threads is.
        stall_s: For how long work may stand still, in s.
        probe: Has one image run; called every few seconds while batches fail.
        on_fault: Called once with what is wrong, on the watchdog's thread.
        clock: Returns the time, in s; it never goes backwards.
    """

    def __init__(
        self,
        pulses: Sequence[Callable[[], Pulse]],
        *,
        stall_s: float,
        probe: Callable[[], None],
        on_fault: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patients = [_Patient(read) for read in pulses]
        self._stall_s = stall_s
        self._probe = probe
        self._on_fault = on_fault
        self._clock = clock
        self._looked_at = clock()
        self._since_probe_s = _PROBE_S
        self._fault: str | None = None
        self._doubt: str | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vpdeploy-watchdog", daemon=True)

    @property
    def fault(self) -> str | None:
        """What ended the service for good; None while it works."""
        return self._fault

    @property
    def doubt(self) -> str | None:
        """Why requests had better go elsewhere; None while they are welcome."""
        return self._fault or self._doubt

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ending.set()

    def look(self) -> None:
        """Look once."""
        if self._fault is not None:
            return
        now = self._clock()
        passed_s, self._looked_at = min(now - self._looked_at, 2 * _LOOK_S), now
        findings = [each.look(passed_s, self._stall_s) for each in self._patients]
        self._doubt = next((doubt for _, doubt in findings if doubt is not None), None)
        self._fault = next((fault for fault, _ in findings if fault is not None), None)
        if self._fault is not None:
            self._on_fault(self._fault)
        elif any(each.failures for each in self._patients):
            self._since_probe_s += passed_s
            if self._since_probe_s >= _PROBE_S:
                self._since_probe_s = 0.0
                self._probe()

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_S):
            try:
                self.look()
            except Exception:  # a watchdog must not die of what it sees
                _log.exception("the watchdog could not look")


class LastResort:
    """Ends the process if it has not ended by itself in time, whatever hangs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends_at: float | None = None

    def end_within(self, seconds: float) -> None:
        """End the process in so many seconds from now; the earliest end that was asked for counts."""
        ends_at = time.monotonic() + seconds
        with self._lock:
            is_first = self._ends_at is None
            self._ends_at = ends_at if self._ends_at is None else min(ends_at, self._ends_at)
        if is_first:
            threading.Thread(target=self._wait, name="vpdeploy-last-resort", daemon=True).start()

    def _wait(self) -> None:
        while True:
            with self._lock:
                assert self._ends_at is not None
                left_s = self._ends_at - time.monotonic()
            if left_s <= 0:
                end_process("stopping took too long, something hangs; ended without waiting for it")
            time.sleep(min(left_s, 0.1))


def end_process(last_words: str) -> NoReturn:
    """End this process at once with exit code 1, running nothing and waiting for no thread.

    Args:
        last_words: What to log first, if that does not hang, too.
    """

    def speak() -> None:
        _log.critical("%s", last_words)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            logging.shutdown()

    speaking = threading.Thread(target=speak, daemon=True)
    speaking.start()
    speaking.join(_LAST_WORDS_S)
    os._exit(1)
