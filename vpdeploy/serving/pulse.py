"""What threads tell of themselves to whoever watches them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How the threads behind a queue are at one moment. There is no time in it: the watcher has its own.

    Attributes:
        fault: What ended a thread, so that nothing is answered any more; None while all of them live.
        is_busy: Whether there is work that should move on.
        mark: Another number whenever work has moved on; one that stays the same while there is work is a standstill.
        place: Where the work is, in words that follow "stands still".
        failures: Runs that failed since the last one that did not.
    """

    fault: str | None = None
    is_busy: bool = False
    mark: int = 0
    place: str = ""
    failures: int = 0
