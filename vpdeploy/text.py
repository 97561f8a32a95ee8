"""Tables as text: columns of equal width."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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
