"""Numbers as people read them."""

from __future__ import annotations

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def bytes_text(size: int) -> str:
    """Return a size in decimal units, e.g. ``172 MB``."""
    number, unit = _scaled(size)
    return f"{number} {unit}B"


def count_text(count: int) -> str:
    """Return a count in decimal units, e.g. ``17.6 G``."""
    number, unit = _scaled(count)
    return f"{number} {unit}".rstrip()


def _scaled(number: int) -> tuple[str, str]:
    for step, unit in _STEPS:
        if number >= step:
            scaled = number / step
            return (f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}"), unit
    return str(number), ""
