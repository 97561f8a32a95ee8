"""Telling how many files of a data set were looked at; a format tells, and whoever asked for the data listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

OnListed = Callable[[int, int | None], None]
"""Told how many were looked at, and of how many where that is known."""


class _Count:
    """Files whose number is not known beforehand, of several folders together."""

    def __init__(self, on_listed: OnListed) -> None:
        self.on_listed = on_listed
        self.files = 0


_listening: ContextVar[_Count | None] = ContextVar("vpdeploy_listing", default=None)


@contextmanager
def listening(on_listed: OnListed) -> Iterator[None]:
    """Have a function told of the files that are listed while the context lasts, in this thread."""
    token = _listening.set(_Count(on_listed))
    try:
        yield
    finally:
        _listening.reset(token)


def listed(files: Iterable[T], *, total: int | None = None) -> Iterator[T]:
    """Yield files as they are, and tell of each.

    Args:
        files: What is listed.
        total: How many they are; None where nobody knows, then they are counted together with earlier ones.
    """
    count = _listening.get()
    if count is None:
        yield from files
    elif total is None:
        for file in files:
            count.files += 1
            count.on_listed(count.files, None)
            yield file
    else:
        for done, file in enumerate(files, start=1):
            count.on_listed(done, total)
            yield file
