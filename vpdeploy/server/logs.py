"""Logs on stderr, as text for people or as one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Literal

LogFormat = Literal["text", "json"]

ACCESS_LOGGER = "vpdeploy.access"
"""The logger of one line for each request; its records bring the fields of their JSON form."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Encode one record."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.name == ACCESS_LOGGER:
            fields.update(getattr(record, "fields", {}))
        else:
            fields["message"] = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class TextFormatter(logging.Formatter):
    """Lines for people. What clients send may stand in them, so control characters are escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Put one record's message on one line."""
        record.message = _CONTROLS.sub(_escape, record.message)
        return super().formatMessage(record)


# C0, DEL, C1, and what ends a line or turns its direction.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


class Repetitions(logging.Filter):
    """Lets the first lines of a kind through and counts the others: what clients send must not fill a disk.

    Lines are of one kind where logger and text agree but for what is filled in. A second of rest or more later, one
    line says how many there were.

    Args:
        most: Lines of a kind that are shown within ``period_s``.
        period_s: How long lines are counted together, in s.
        clock: Returns the time, in s; it never goes backwards.
    """

    def __init__(self, *, most: int = 5, period_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most = most
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, int, str], int] = {}
        self._begun_at = clock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown; the first one of a new period takes the sums of the last one with it."""
        if record.name == ACCESS_LOGGER:  # each of these lines is asked for
            return True
        kind = (record.name, record.levelno, str(record.msg))
        with self._lock:
            now = self._clock()
            sums = ""
            if now - self._begun_at >= self._period_s:
                sums = self._sums(now - self._begun_at)
                self._counts.clear()
                self._begun_at = now
            if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
                kind = ("", 0, "")
            count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if sums:
            record.msg, record.args = f"{record.getMessage()} ({sums})", None
        return count <= self._most

    def _sums(self, seconds: float) -> str:
        hidden = sum(count - self._most for count in self._counts.values() if count > self._most)
        return f"and {hidden:,} more lines like the ones before in {seconds:.0f} s" if hidden else ""


_MAX_KINDS = 1000


def configure_logs(log_format: LogFormat) -> None:
    """Send all logs of this process to stderr in one format: vpdeploy's from info on, others' from warning on."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter())
    handler.addFilter(Repetitions())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # It logs every malformed form; whoever sent it is told, the log need not be.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    own = logging.getLogger("vpdeploy")
    own.setLevel(logging.INFO)
    own.handlers.clear()  # the command line's, which print bare messages
    own.propagate = True
