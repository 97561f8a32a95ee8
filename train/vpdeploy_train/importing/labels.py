"""Class names from a file: one a line, or a JSON list."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from vpdeploy.errors import SpecError


def read_labels(path: Path) -> tuple[str, ...]:
    """Read class names in index order: a ``.json`` file is a list of strings, any other has one name a line.

    Raises:
        SpecError: The file cannot be read, holds something else, or a name is empty or repeated.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SpecError(f"--labels {path}: cannot be read: {reason}") from error
    names = _json_names(path, text) if path.suffix == ".json" else text.rstrip().splitlines()
    labels = tuple(name.strip() for name in names)
    if not labels or "" in labels:
        place = f"line {labels.index('') + 1} is empty" if labels else "it is empty"
        raise SpecError(f"--labels {path}: {place}; expected one class name for each class")
    repeated = [name for name, count in Counter(labels).items() if count > 1]
    if repeated:
        raise SpecError(f"--labels {path}: '{repeated[0]}' is given twice; class names should differ")
    return labels


def _json_names(path: Path, text: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"--labels {path}: not valid JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecError(f'--labels {path}: expected a JSON list of class names, e.g. ["cat", "dog"]')
    return names
