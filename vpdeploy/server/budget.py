"""The budget of bytes that requests make the server hold: bodies as sent and inflated, and pixels while they decode."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType

from vpdeploy.errors import QueueFullError
from vpdeploy.server.statuses import TooLargeError


class MemoryBudget:
    """Counts what all requests hold together, and what each client's hold. Any thread may use it.

    Args:
        total_bytes: What all requests together may hold.
        client_bytes: What the requests of one client may hold, so that no client takes all of it.
    """

    def __init__(self, *, total_bytes: int, client_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._client_bytes = min(client_bytes, total_bytes)
        self._held_bytes = 0
        self._held_by: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes that are held now."""
        return self._held_bytes

    def reserve(self, client: str) -> Reservation:
        """Return an empty reservation of a client's; it grows with what the request holds."""
        return Reservation(self, client)

    def take(self, client: str, size: int) -> None:
        """Count more bytes, before they are held.

        Raises:
            TooLargeError: They are more than a client may ever hold.
            QueueFullError: They do not fit beside what is held now.
        """
        with self._lock:
            if size > self._client_bytes:
                raise TooLargeError(f"the request needs {size} bytes at once, a client may hold {self._client_bytes}")
            if self._held_bytes + size > self._total_bytes:
                raise QueueFullError(
                    f"the requests under way hold as much as the accepted {self._total_bytes} bytes; try again later"
                )
            if self._held_by[client] + size > self._client_bytes:
                raise QueueFullError(
                    f"the requests of this client hold as much as its share of {self._client_bytes} bytes; "
                    "try again later"
                )
            self._held_bytes += size
            self._held_by[client] += size

    def give_back(self, client: str, size: int) -> None:
        """Count bytes as held no more."""
        with self._lock:
            self._held_bytes -= size
            self._held_by[client] -= size
            if not self._held_by[client]:
                del self._held_by[client]


class Reservation:
    """What one request, or one step of it, holds of a budget; as a context manager it ends with the block."""

    def __init__(self, budget: MemoryBudget, client: str) -> None:
        self._budget = budget
        self._client = client
        self._size = 0
        self._ended = False
        self._lock = threading.Lock()

    def grow(self, size: int) -> None:
        """Reserve more bytes, before they are held; raises as the budget does, and where the request has ended."""
        with self._lock:
            if self._ended:  # a thread still works for it
                raise QueueFullError("the request has ended")
            self._budget.take(self._client, size)
            self._size += size

    def shrink(self, size: int) -> None:
        """Give back a part."""
        with self._lock:
            if not self._ended:
                self._budget.give_back(self._client, size)
                self._size -= size

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            self._budget.give_back(self._client, self._size)
