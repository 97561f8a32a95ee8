"""What a verb tells on stderr while it works: bare lines for people, marked where they warn."""

from __future__ import annotations

import logging
import sys


class StderrHandler(logging.Handler):
    """Writes to whatever stderr is by then: who runs several verbs may give each another one, and close it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # logging's own way: a line that cannot be written ends no work
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """The message alone, behind ``warning:`` where it is one, as errors stand behind ``error:``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = super().format(record)
        return f"warning: {line}" if record.levelno >= logging.WARNING else line


def tell_on_stderr() -> None:
    """Send this package's messages from info on to stderr."""
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("vpdeploy")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
