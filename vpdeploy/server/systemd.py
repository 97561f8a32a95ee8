"""What systemd is told of a server: that it is ready, that it stops, and again and again that it is alive.

The protocol is sd_notify(3)'s: datagrams of ``NAME=VALUE`` lines to the socket that ``NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

_log = logging.getLogger(__name__)


class Notifier:
    """Tells systemd how a server is; where none listens, it does nothing.

    Args:
        environment: Holds systemd's variables.
        clock: Returns the time, in s; it never goes backwards.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._every_s = _watchdog_s(environment) / 2
        self._beat_at = -self._every_s
        self._is_stopping = False

    def ready(self, status: str) -> None:
        """Tell that requests are answered from now on."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def beat(self) -> None:
        """Tell that the server is alive, if it is time to; call it often, and not from a thread of its own."""
        now = self._clock()
        if self._every_s and now - self._beat_at >= self._every_s:
            self._beat_at = now
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Tell, once, that the server has begun to stop."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)  # serving must not wait for whoever reads it
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            _log.warning("systemd cannot be told %s: %s", message.partition("\n")[0], error)


def _address(name: str) -> str | None:
    """Return the socket's address; a name that begins with ``@`` is abstract, one that is no path is not followed."""
    if not hasattr(socket, "AF_UNIX") or not name.startswith(("/", "@")):
        return None
    return f"\0{name[1:]}" if name.startswith("@") else name


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """Return how long systemd waits for a sign of life, in s; 0 where it does not wait for this process's."""
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        owner = int(environment.get("WATCHDOG_PID", str(os.getpid())))
    except ValueError:
        return 0.0
    return max(0, microseconds) / 1e6 if owner == os.getpid() else 0.0


def _line(text: str) -> str:
    return " ".join(text.split())
