"""Which lanes are free, and who waits for which."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from vpdeploy.backends.native.lane import Lane
from vpdeploy.errors import BackendError


class LanePool:
    """Lends each lane to one thread at a time.

    Args:
        lanes: All of them, free.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = tuple(lanes)
        self._free = list(lanes)
        self._wanted: list[Lane] = []
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def any(self) -> Iterator[Lane]:
        """Lend a free lane, the one used last; wait for one if there is none.

        Raises:
            BackendError: The pool was closed.
        """
        with self._changed:
            while not self._closed and not self._available():
                self._changed.wait()
            self.check_open()
            lane = self._available()[-1]
            self._free.remove(lane)
        try:
            yield lane
        finally:
            self._give_back(lane)

    @contextlib.contextmanager
    def this(self, lane: Lane) -> Iterator[Lane]:
        """Lend one lane, ahead of everyone who waits for any."""
        with self._changed:
            self._wanted.append(lane)
            while lane not in self._free:
                self._changed.wait()
            self._wanted.remove(lane)
            self._free.remove(lane)
        try:
            yield lane
        finally:
            self._give_back(lane)

    def check_open(self) -> None:
        """Raise BackendError if the pool was closed."""
        if self._closed:
            raise BackendError("the session is closed; load the bundle again")

    def close(self) -> bool:
        """Lend no lane to ``any`` from now on; return whether this was the first call."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
        return first

    def _available(self) -> list[Lane]:
        return [lane for lane in self._free if lane not in self._wanted]

    def _give_back(self, lane: Lane) -> None:
        with self._changed:
            self._free.append(lane)
            self._changed.notify_all()
