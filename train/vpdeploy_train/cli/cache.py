"""``--cache`` of the verbs that read many images: how much memory decoded ones may take."""

from __future__ import annotations

import re
from typing import Annotated, Final, TypeAlias

import typer

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT])(i?)B?", re.IGNORECASE)
_POWERS: Final = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_cache(text: str) -> int:
    """Return a size in bytes: ``2GiB`` or ``2G`` are 2 · 1024³, ``2GB`` are 2 · 1000³, ``0`` is none.

    Raises:
        typer.BadParameter: It is no size; a number needs its unit.
    """
    if text.strip() == "0":
        return 0
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"'{text}' is no size; expected such as 2GiB, 500MiB or 0")
    number, unit, binary = found.groups()
    base = 1000 if not binary and text.strip()[-1] in "bB" else 1024
    return int(float(number) * base ** _POWERS[unit.lower()])


Cache: TypeAlias = Annotated[
    int | None,
    typer.Option(
        parser=parse_cache,
        metavar="SIZE",
        help="Memory for decoded images, e.g. 2GiB; 0 keeps none. Default: half of what is free.",
    ),
]
"""``--cache`` of every verb that keeps decoded images."""
