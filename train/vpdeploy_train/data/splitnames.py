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


def split_alike(name: str) -> str | None:
    """Return the split that a name looks like: ``train2017``, ``test_set``, ``eval``; None where it looks like none.

    It is ``train``, ``val``, ``test``, or a word that may mean either of the latter.
    """
    found = _LOOKALIKE.fullmatch(name.strip().lower())
    if found is None:
        return None
    word = found[1] or found[3]
    return SPLIT_NAMES.get(word, word)
