"""VTAB-1k as its community ships it: one folder a task, one list of images a split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy.tree import list_folder
from vpdeploy_train.data.address import Address
from vpdeploy_train.data.collection import Collection, Format, Item
from vpdeploy_train.data.listing import listed
from vpdeploy_train.data.manifest import is_file, read_text

_PREFIX: Final = "vtab:"
_LISTS: Final = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
_TRAIN_AND_VAL: Final = "train800val200.txt"
_CLASS_NAMES: Final = "classes.txt"
_MOST_CLASSES: Final = 10_000
_NUMBER: Final = re.compile(r"[0-9]{1,9}")


def read_vtab(spec: str) -> Collection:
    """Read ``vtab:DIR``, the folder of one task.

    Its lists name an image, relative to the folder, and a whole number, its class, in each line. Class names come
    from ``classes.txt``, one a line, where there is one; else classes are called by their numbers, up to the largest
    in any list: with 800 training images some of the classes of SUN397 occur in the test list alone. Where the
    training images come in one list, ``train800val200.txt``, validation images are carved out of it.

    Raises:
        SpecError: A file is missing, a line is not of that form, or a class is beyond those of ``classes.txt``.
    """
    root = Path(spec.removeprefix(_PREFIX)).expanduser()
    lists = {split: root / name for split, name in _LISTS.items()}
    if (root / _TRAIN_AND_VAL).is_file() and not lists["train"].exists() and not lists["val"].exists():
        lists = {"train": root / _TRAIN_AND_VAL, "test": lists["test"]}
    for path in lists.values():
        if not path.is_file():
            raise SpecError(f"{path}: file not found; {_expectation(root)}")
    names = _read_class_names(root / _CLASS_NAMES)
    numbered = {split: _read_list(path, names) for split, path in lists.items()}
    if names is None:
        names = tuple(str(label) for label in range(1 + max(label for rows in numbered.values() for _, label in rows)))
    return Collection(
        splits={
            split: tuple(Item(source=file, class_name=names[label]) for file, label in rows)
            for split, rows in numbered.items()
        },
        augmentation="none",
        labels=names,
    )


def _expectation(root: Path) -> str:
    """Return what the folder should be, and where its subfolders are tasks, which to choose from."""
    if root.is_dir():
        tasks = sorted(folder.name for folder in list_folder(root) if (folder / _LISTS["test"]).is_file())
        if tasks:
            return f"name one task's folder, such as {_PREFIX}{root / tasks[0]}; there are {', '.join(tasks)}"
    return f"expected a VTAB-1k task: {', '.join(_LISTS.values())} and images/"


def _read_class_names(path: Path) -> tuple[str, ...] | None:
    """Read class names, one a line; None where there is no such file."""
    if not path.is_file():
        return None
    names = tuple(line.strip() for line in read_text(path).rstrip().split("\n"))
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            raise SpecError(f"{path}: line {number}: {f'{name!r} is repeated' if name else 'no name'}; one a line")
        seen.add(name)
    return names


def _read_list(path: Path, names: tuple[str, ...] | None) -> list[tuple[Path, int]]:
    """Read the images of one list and the numbers of their classes."""
    rows, missing = [], []
    limit = _MOST_CLASSES if names is None else len(names)
    lines = read_text(path).split("\n")
    for number, line in enumerate(listed(lines, total=len(lines)), start=1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            continue
        if len(fields) < 2 or not _NUMBER.fullmatch(fields[1]):
            found = line.strip()[:80]
            raise SpecError(f"{path}: line {number} is '{found}'; expected an image's path and the number of its class")
        label = int(fields[1])
        if label >= limit:
            known = "" if names is None else f", as {_CLASS_NAMES} names {len(names)}"
            raise SpecError(f"{path}: line {number}: class {label}; expected 0 to {limit - 1}{known}")
        file = path.parent / fields[0].strip()
        if not is_file(file):
            missing.append(f"line {number}: {fields[0].strip()[:200]}")
        rows.append((file, label))
    if missing:
        raise SpecError(
            f"{path}: {missing[0]} is not there ({len(missing)} of {len(rows)} images are not): "
            f"paths are relative to {path.parent}"
        )
    if not rows:
        raise SpecError(f"{path}: no images; expected one a line, its path and its class number")
    return rows


FORMAT: Final = Format(
    spelling="vtab:DIR",
    matches=lambda spec: spec.startswith(_PREFIX),
    locate=lambda spec: Address(before=_PREFIX, path=Path(spec.removeprefix(_PREFIX))),
    read=read_vtab,
)
