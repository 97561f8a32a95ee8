"""What libraries print to stderr past Python, kept back so that an error stays one line."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

_STDERR = 2


@contextlib.contextmanager
def without_lines(start: bytes) -> Iterator[TextIO]:
    """Keep stderr back until the block ends, then print it without the lines that begin with ``start``.

    Yields:
        The real stderr, for what cannot wait: a progress bar.
    """
    sys.stderr.flush()
    real = os.dup(_STDERR)
    with os.fdopen(real, "w", encoding="utf-8", errors="replace") as stream, tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), _STDERR)
        try:
            yield stream
        finally:
            sys.stderr.flush()
            stream.flush()
            os.dup2(real, _STDERR)
            kept.seek(0)
            for line in kept:
                if not line.startswith(start):
                    os.write(_STDERR, line)
