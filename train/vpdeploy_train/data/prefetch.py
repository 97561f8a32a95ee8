"""Preparing the next batches while the present one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

T = TypeVar("T")

_DEPTH: Final = 2
_PATIENCE_S: Final = 0.1  # how often a thread with a full queue looks whether anyone still wants its items


@contextmanager
def prefetched(items: Iterable[T], *, depth: int = _DEPTH) -> Iterator[Iterator[T]]:
    """Draw items in a thread of their own, up to ``depth`` ahead of the consumer.

    An error of ``items`` reaches the consumer in its place. The thread has ended when the context is left.

    Args:
        items: Iterated in the thread alone.
        depth: Items that may wait.
    """
    waiting: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    abandoned = threading.Event()

    def offer(entry: tuple[T] | BaseException | None) -> bool:
        while not abandoned.is_set():
            try:
                waiting.put(entry, timeout=_PATIENCE_S)
            except queue.Full:
                continue
            return True
        return False

    def fill() -> None:
        try:
            for item in items:
                if not offer((item,)):
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    def drain() -> Iterator[T]:
        while (entry := waiting.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]

    thread = threading.Thread(target=fill, name="vpdeploy-prefetch", daemon=True)
    thread.start()
    try:
        yield drain()
    finally:
        abandoned.set()
        thread.join()
