"""TOML, as users write settings and tokens: text to values, and what a misspelt name may have meant."""

from __future__ import annotations

import sys
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any


def parse_toml(text: str) -> dict[str, Any]:
    """Return what a TOML text says.

    Raises:
        ValueError: It is not TOML.
    """
    # Imported here: the command line reads modules with options without the extra installed.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def name_advice(name: str, known: Collection[str]) -> str:
    """Return what may have been meant by the name of a setting."""
    close = get_close_matches(name.replace("-", "_").lower(), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(known)}"
