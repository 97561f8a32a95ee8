"""Sizes in options, such as 2GiB or 500MB, and batch sizes."""

from __future__ import annotations

import re
from typing import Final

import typer

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B?", re.IGNORECASE)
_POWERS: Final = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str | int) -> int:
    """Return a size in bytes: ``2GiB`` or ``2G`` are 2 · 1024³, ``2GB`` are 2 · 1000³, ``0`` is none.

    Raises:
        typer.BadParameter: It is no size; a number needs its unit.
    """
    if isinstance(text, int):  # an option's default
        return text
    if text.strip() == "0":
        return 0
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"'{text}' is no size; expected such as 2GiB, 500MiB or 0")
    number, unit, binary = found.groups()
    base = 1000 if not binary and text.strip()[-1] in "bB" else 1024
    return int(float(number) * base ** _POWERS[unit.lower()])


def parse_batch_size(text: str | int) -> int | None:
    """Return a batch size; None for ``auto``, which leaves it to a measurement.

    Raises:
        typer.BadParameter: It is neither ``auto`` nor a whole number of at least 1.
    """
    if isinstance(text, int):
        return text
    text = text.strip()
    if text.lower() == "auto":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) > 0):
        raise typer.BadParameter(f"'{text[:40]}' is no batch size; expected auto or a number of at least 1")
    return int(text)
