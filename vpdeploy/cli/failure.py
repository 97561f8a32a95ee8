"""How an error ends a verb: one line on stderr and, where JSON was asked for, an object on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO, cast

import typer

_NAMED: Final = 3
"""Files and folders that one line names."""


class WatchedOutput:
    """A stream that knows whether anything was written to it; all else is the stream's own.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_used = False

    def write(self, text: str) -> int:
        """Write a text."""
        self.is_used = self.is_used or bool(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Tell whether a command line asks for JSON; what stands behind ``--`` are names."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


@contextlib.contextmanager
def watching_stdout(arguments: Sequence[str]) -> Iterator[None]:
    """Watch stdout in the block where the command line asks for JSON: an error must not stand behind a report."""
    real = sys.stdout
    if asks_for_json(arguments):
        sys.stdout = cast(TextIO, WatchedOutput(real))
    try:
        yield
    finally:
        sys.stdout = real


def report_failure(kind: str, message: str, code: int) -> None:
    """Print an error as JSON to stdout, where JSON was asked for and nothing is there yet.

    Args:
        kind: The class of the error.
        message: What stderr says, without its ``error:``.
        code: The exit code.
    """
    if isinstance(sys.stdout, WatchedOutput) and not sys.stdout.is_used:
        fields = {"error": {"kind": kind, "message": message, "exit_code": code}}
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))


def fail(error: Exception, code: int) -> NoReturn:
    """End the process with an error: one line on stderr, and JSON where that was asked for."""
    message = " ".join(str(error).split())
    report_failure(type(error).__name__, message, code)
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def report_stop(message: str, code: int) -> None:
    """Say in one line that the verb was stopped, and in JSON where that was asked for.

    Args:
        message: What was written, or how to go on.
        code: The exit code.
    """
    report_failure("Stopped", f"stopped; {message}", code)
    after_the_echo = "\n" if sys.stderr.isatty() else ""  # terminals show Ctrl-C as ^C
    typer.echo(f"{after_the_echo}stopped; {message}", err=True)


def describe_results(paths: Sequence[Path]) -> str:
    """Return what a verb wrote before it was stopped.

    Args:
        paths: The files and folders that it put in their places, some of which may be gone again, or lie in others.
    """
    there = {path for path in dict.fromkeys(paths) if path.exists()}
    outer = sorted(path for path in there if there.isdisjoint(path.parents))
    if not outer:
        return "nothing was written"
    more = f" and {len(outer) - _NAMED} more" if len(outer) > _NAMED else ""
    return f"written before: {', '.join(map(str, outer[:_NAMED]))}{more}"


def fail_usage(error: Exception) -> NoReturn:
    """End the process because of the command line itself, as Typer says it, and in JSON where that was asked for.

    Args:
        error: One of the classes that ``typer.BadParameter`` inherits from.
    """
    usage: Any = error
    message = " ".join(str(usage.format_message()).split())
    report_failure("UsageError", message, usage.exit_code)
    usage.show()
    sys.exit(usage.exit_code)
