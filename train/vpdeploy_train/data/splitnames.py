"""How splits are called, in folders, manifests and data sets of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

SPLIT_NAMES: Final[Mapping[str, str]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Every spelling of the splits, in lower case; upper case means the same."""

_WORDS: Final = "|".join([*SPLIT_NAMES, "eval", "evaluation", "holdout"])
_LOOKALIKE: Final = re.compile(rf"({_WORDS})([^a-z].*)?|.*[^a-z]({_WORDS})", re.DOTALL)


def split_named(name: str) -> str | None:
    """Return the split ``train``, ``val`` or ``test`` that a name means; None where it means none."""
    return SPLIT_NAMES.get(name.strip().lower())


def looks_like_split(name: str) -> bool:
    """Tell whether a name is a split's, or has one at its begin or end: ``train2017``, ``test_set``, ``eval``."""
    return _LOOKALIKE.fullmatch(name.strip().lower()) is not None
