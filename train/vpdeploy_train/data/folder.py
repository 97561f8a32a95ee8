"""Folders of images: ``DIR/class/x.jpg``, or ``DIR/train/class/x.jpg`` with ``val`` and ``test`` beside it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy.tree import is_hidden, is_image, list_folder, natural_key, walk_files
from vpdeploy_train.data.address import Address
from vpdeploy_train.data.collection import UNSPLIT, Collection, Format, Item
from vpdeploy_train.data.listing import listed
from vpdeploy_train.data.splitnames import split_alike, split_named

_log = logging.getLogger("vpdeploy.train")

_AS_CLASSES: Final = "where all folders are classes, name path and label of each image in a manifest FILE.csv"


@dataclass
class _Findings:
    """What reading a folder came across beside the images."""

    ignored: list[Path] = field(default_factory=list)


def read_folder(spec: str) -> Collection:
    """Read a folder of class folders, or of split folders of class folders.

    Images may lie at any depth of a class folder. Hidden files are passed over; other files that are not images
    are counted in one warning.

    Raises:
        SpecError: The folder cannot be read, or its layout is neither of the two.
    """
    root = Path(spec).expanduser()
    findings = _Findings()
    folders = _subfolders(root, findings)
    if not folders:
        if any(is_image(path) for path in findings.ignored):
            raise SpecError(f"{spec}: images but no class folders; expected {spec}/CLASS/IMAGE.jpg")
        raise SpecError(f"{spec}: no class folders; expected {spec}/CLASS/IMAGE.jpg or {spec}/train/CLASS/IMAGE.jpg")
    named = {path: split for path in folders if (split := split_named(path.name)) is not None}
    splits: dict[str, tuple[Item, ...]] = {}
    # A class may be called "train" (it is one in CIFAR-100): only a folder of folders is a split.
    if any(_subfolders(path, _Findings()) for path in named):
        others = [path.name for path in folders if path not in named]
        if others:
            raise SpecError(
                f"{spec}: unexpected folder '{others[0]}' beside the split folders "
                f"{', '.join(path.name for path in named)}: move it away, or call it train, val or test; {_AS_CLASSES}"
            )
        for path, split in named.items():
            if split in splits:
                raise SpecError(f"{spec}: two folders for the split '{split}'; keep one of them")
            splits[split] = _read_classes(path, findings, may_lack_images=split != "train")
    elif len(named) == len(folders):
        raise SpecError(
            f"{spec}: '{folders[0].name}' holds no class folders; expected {spec}/{folders[0].name}/CLASS/IMAGE.jpg"
        )
    else:
        _ask_about_lookalikes(spec, folders)
        splits[UNSPLIT] = _read_classes(root, findings, may_lack_images=False)
        _ask_about_inner_splits(spec, root, splits[UNSPLIT])
    if findings.ignored:
        count = len(set(findings.ignored))
        whose = "1 file that is no image of a class is" if count == 1 else f"{count} files that are not images are"
        _log.warning("%s: %s ignored: %s%s", spec, whose, findings.ignored[0], ", ..." if count > 1 else "")
    return Collection(splits=splits, augmentation="crop-flip")


def _ask_about_lookalikes(spec: str, folders: Sequence[Path]) -> None:
    """Refuse folders that look like several splits by their names and by what they hold, but are not called so.

    They do where two of them hold folders of the same name, or where there are no other folders.

    Raises:
        SpecError: It has to be said what they are.
    """
    if len(folders) == 1 and (inside := _subfolders(folders[0], _Findings())):
        raise SpecError(
            f"{spec}: the one folder '{folders[0].name}', with {len(inside)} folders in it, would be the one class: "
            f"did you mean {folders[0]}?"
        )
    alike = {path: split for path in folders if (split := split_alike(path.name)) is not None}
    if len(set(alike.values())) < 2:
        return
    held = Counter(each.name for path in alike for each in _subfolders(path, _Findings()))
    if any(count > 1 for count in held.values()) or (len(alike) == len(folders) and not held):
        first = {split: path.name for path, split in reversed(alike.items())}
        raise SpecError(
            f"{spec}: {' and '.join(repr(name) for name in first.values())} look like splits, but would be classes: "
            f"call them train, val or test; {_AS_CLASSES}"
        )


def _ask_about_inner_splits(spec: str, root: Path, items: Sequence[Item]) -> None:
    """Refuse class folders that hold nothing but split folders: the splits would be mixed.

    Raises:
        SpecError: They do.
    """
    depth = len(root.parts) + 1
    inner: set[str] = set()
    for item in items:
        parts = item.source.parts if isinstance(item.source, Path) else ()
        split = split_named(parts[depth]) if len(parts) > depth + 1 else None
        if split is None:
            return
        inner.add(split)
    if len(inner) > 1:
        raise SpecError(
            f"{spec}: the class folders hold split folders, which would be mixed: move the splits above the classes, "
            f"{spec}/train/CLASS/IMAGE.jpg, or name path, label and split of each image in a manifest FILE.csv"
        )


def _subfolders(root: Path, findings: _Findings) -> list[Path]:
    """Return the visible folders of a folder in natural order, and note the files beside them."""
    entries = [path for path in list_folder(root) if not is_hidden(path)]
    findings.ignored.extend(path for path in entries if not path.is_dir())
    return sorted((path for path in entries if path.is_dir()), key=lambda path: natural_key(path.name))


def _read_classes(root: Path, findings: _Findings, *, may_lack_images: bool) -> tuple[Item, ...]:
    """Read the class folders of one split."""
    items: list[Item] = []
    for folder in _subfolders(root, findings):
        files = sorted(listed(walk_files(folder)), key=lambda path: natural_key(str(path)))
        images = [path for path in files if is_image(path)]
        findings.ignored.extend(path for path in files if not is_image(path))
        if not images and not may_lack_images:
            raise SpecError(f"{folder}: the class folder holds no images: add images or remove the folder")
        items.extend(Item(source=path, class_name=folder.name) for path in images)
    return tuple(items)


FORMAT: Final = Format(
    spelling="DIR",
    matches=lambda spec: bool(spec) and Path(spec).expanduser().is_dir(),
    locate=lambda spec: Address(path=Path(spec)),
    read=read_folder,
)
