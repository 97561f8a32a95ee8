"""Places of which there are only so many, and of which no client may take all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from vpdeploy.errors import QueueFullError


class ClientPlaces:
    """Places that threads take and give back. Any thread may use it.

    Args:
        total: How many there are.
        per_client: How many one client may have; at most one less than there are, where there are several.
        what: What takes a place, in the plural, for errors.
    """

    def __init__(self, *, total: int, per_client: int, what: str) -> None:
        self._free = total
        self._per_client = max(1, min(per_client, total - 1))
        self._what = what
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0

    @property
    def in_use(self) -> int:
        """How many places are taken."""
        with self._lock:
            return self._taken.total()

    def are_wanted_from(self, client: str) -> bool:
        """Tell whether somebody waits for a place, and a client has half of what it may have or more."""
        return self._waiting > 0 and 2 * self._taken.get(client, 0) >= self._per_client

    def take(
        self, client: str, *, wait_s: float = 0.0, is_wanted: Callable[[], bool] = lambda: True
    ) -> Callable[[], None]:
        """Take a place for a client.

        Args:
            client: The client.
            wait_s: How long to wait for one, in s.
            is_wanted: Asked now and then while waiting; a place that is not wanted any more is refused.

        Returns:
            Gives the place back; to be called once.

        Raises:
            QueueFullError: There is none.
        """
        until = time.monotonic() + wait_s
        with self._lock:
            while not self._free or self._taken[client] >= self._per_client:
                left = until - time.monotonic()
                if left <= 0 or not is_wanted():
                    whose = "this client has" if self._taken[client] >= self._per_client else "all clients have"
                    raise QueueFullError(f"{whose} as many {self._what} as are accepted; try again later")
                self._waiting += 1
                self._changed.wait(min(left, _LOOK_S))
                self._waiting -= 1
            self._free -= 1
            self._taken[client] += 1

        def give_back() -> None:
            with self._lock:
                self._free += 1
                self._taken[client] -= 1
                if not self._taken[client]:
                    del self._taken[client]
                if self._waiting:
                    self._changed.notify_all()

        return give_back

    @contextlib.contextmanager
    def taken(self, client: str, *, wait_s: float, is_wanted: Callable[[], bool]) -> Iterator[None]:
        """Take a place for as long as a block runs; see ``take``."""
        give_back = self.take(client, wait_s=wait_s, is_wanted=is_wanted)
        try:
            yield
        finally:
            give_back()


_LOOK_S = 0.5
