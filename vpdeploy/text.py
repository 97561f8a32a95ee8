"""Text for people: tables with columns of equal width, sizes and counts with their units."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_UNSCALED = 10**18


def shell_path(path: Path | str) -> str:
    """Return a path as it is pasted into a shell: quoted where it must be, and never taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the length of each column's longest cell."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def align(rows: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> list[str]:
    """Return a line for each row, two spaces between its columns and none at its end.

    Args:
        rows: Cells; every row has as many.
        left: Indices of the columns that stand to the left; numbers, and all else, stand to the right.
    """
    widths = column_widths(rows)
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bytes_text(size: int) -> str:
    """Return a size in decimal units, e.g. ``172 MB``."""
    number, unit = _scaled(size)
    return f"{number} {unit}B"


def count_text(count: int) -> str:
    """Return a count in decimal units, e.g. ``17.6 G``."""
    number, unit = _scaled(count)
    return f"{number} {unit}".rstrip()


def differing(mine: str, other: str, least: int = 12) -> tuple[str, str]:
    """Return the beginnings of two different digests, as long as it takes to see that they differ."""
    same = next((index for index, (one, two) in enumerate(zip(mine, other, strict=False)) if one != two), len(mine))
    length = max(least, same + 1)
    return mine[:length], other[:length]


def cut_name(name: str, most: int = 40) -> str:
    """Return a class name on one line of at most so many characters."""
    line = "".join(character if character.isprintable() else " " for character in name)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def printable(text: str, most: int) -> str:
    """Return what somebody else wrote as it may stand in a log: on one line, without control characters, cut.

    Whatever does not show is written as in Python's string literals, spaces as ``%20``.
    """
    escaped = "".join(
        _ESCAPES.get(character) or (character if character.isprintable() else _escape(character))
        for character in text[:most]
    )
    return escaped if len(text) <= most else f"{escaped}…"


_ESCAPES = {" ": "%20", "\\": "\\\\"}


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _scaled(number: int) -> tuple[str, str]:
    if number >= _UNSCALED:  # no float holds every integer that a damaged file may give
        return str(number // 10**12), "T"
    for step, unit in _STEPS:
        if number >= step:
            scaled = number / step
            return (f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}"), unit
    return str(number), ""
