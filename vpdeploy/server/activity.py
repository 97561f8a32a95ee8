"""What a server did in each of the last seconds, for charts that are drawn live."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vpdeploy.serving.batch import BatchReport

KEPT_SECONDS = 120
"""Seconds that are remembered."""


@dataclass(kw_only=True)
class _Second:
    """What the batches of one second add up to."""

    second: int
    batches: int = 0
    tasks: int = 0
    run_s: float = 0.0
    waited_s: float = 0.0
    images: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {
            "second": self.second,
            "batches": self.batches,
            "tasks": self.tasks,
            "run_s": round(self.run_s, 4),
            "waited_s": round(self.waited_s, 4),
            "images": dict(self.images),
        }


class Activity:
    """Sums up batches by the second in which they ended. Every method may be called from any thread.

    Args:
        clock: Returns the time, in s; it never goes backwards.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._lock = threading.Lock()
        self._seconds: deque[_Second] = deque(maxlen=KEPT_SECONDS)

    @property
    def second(self) -> int:
        """The second that is under way, counted from the start."""
        return int(self._clock() - self._started_at)

    def count_batch(self, report: BatchReport) -> None:
        """Count one batch that ran."""
        second = self.second
        with self._lock:
            if not self._seconds or self._seconds[-1].second < second:
                self._seconds.append(_Second(second=second))
            last = self._seconds[-1]
            last.batches += 1
            last.tasks += len(report.images)
            last.run_s += report.run_s
            last.waited_s += sum(report.queue_s)
            last.images.update(report.images)

    def seconds(self, *, since: int) -> list[dict[str, Any]]:
        """Return what is known of the seconds from ``since`` on that are over and in which a batch ended.

        Each is a JSON object: ``second``, ``batches``, ``tasks`` (different ones, summed over the batches), ``run_s``
        and ``waited_s`` (how long batches ran and images waited, in s, summed) and ``images`` by task. As each image's
        time in the queue is summed, ``waited_s`` is also the mean length of the queue.
        """
        now = self.second
        with self._lock:
            return [each.to_json() for each in self._seconds if max(since, now - KEPT_SECONDS) <= each.second < now]
