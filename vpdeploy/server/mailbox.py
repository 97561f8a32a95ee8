"""Calls on an event loop that other threads ask for: many of them wake it once."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """What other threads have to tell a loop. Waking a loop is a system call, so it is woken only where it sleeps.

    Args:
        loop: The loop on which the calls are made.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # mailboxes are found by their loops, and end with them
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_woken = False

    def post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have the loop make a call, from any thread; it must not raise. A closed loop makes none."""
        self._calls.append((call, arguments))
        if not self._is_woken:
            self._is_woken = True
            loop = self._loop()
            with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
                if loop is not None:
                    loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        # First: what is posted from here on wakes the loop again, or is found below.
        self._is_woken = False
        while self._calls:
            call, arguments = self._calls.popleft()
            call(*arguments)


_MAILBOXES: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()


def running_mailbox() -> Mailbox:
    """Return the mailbox of the running loop."""
    loop = asyncio.get_running_loop()
    mailbox = _MAILBOXES.get(loop)
    if mailbox is None:
        mailbox = _MAILBOXES[loop] = Mailbox(loop)
    return mailbox
