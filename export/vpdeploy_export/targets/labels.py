"""Class names as the text files that other runtimes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LABELS_FOLDER = "labels"


def write_labels(folder: Path, task: str, labels: Sequence[str]) -> str:
    """Write one label a line; the line's number is the class.

    Returns:
        The file's path relative to ``folder``.
    """
    path = folder / LABELS_FOLDER / f"{task}.txt"
    path.parent.mkdir(exist_ok=True)
    lines = [" ".join(label.split()) for label in labels]  # a line break in a label would shift all that follow
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"{LABELS_FOLDER}/{task}.txt"
