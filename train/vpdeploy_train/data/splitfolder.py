"""Folders with one flat JSON manifest for each split, as the fine-grained data sets of the VPT papers come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy_train.data.address import Address
from vpdeploy_train.data.collection import Collection, Format
from vpdeploy_train.data.manifest import collect, read_text
from vpdeploy_train.data.rows import Row, read_json_rows

_FILES: Final = {"train": "train.json", "val": "val.json", "test": "test.json"}

_IMAGE_FOLDERS: Final = ("", "images", "Images")
"""Where the paths of the manifests start: CUB and NABirds ``images``, Dogs ``Images``, Flowers and Cars the folder."""


def read_split_folder(spec: str) -> Collection:
    """Read ``train.json`` and, where present, ``val.json`` and ``test.json``, each of the form ``{path: class}``.

    Paths are relative to the folder, or to ``images`` or ``Images`` in it, whichever holds the first one.

    Raises:
        SpecError: A manifest cannot be read, an entry contradicts another, or a file is missing.
    """
    folder = Path(spec).expanduser()
    rows = [row for split, name in _FILES.items() if (folder / name).is_file() for row in _read(folder / name, split)]
    try:
        return collect(_image_folder(folder, rows), rows)
    except SpecError as error:
        raise SpecError(f"{spec}: {error}") from None


def _read(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of one split's manifest; places name the file."""
    try:
        for row in read_json_rows(read_text(path)):
            yield replace(row, split=split, place=f"{path.name}, {row.place}")
    except SpecError as error:
        raise error if str(error).startswith(str(path)) else SpecError(f"{path}: {error}") from None


def _image_folder(folder: Path, rows: list[Row]) -> Path:
    """Return what the paths are relative to."""
    if rows:
        for name in _IMAGE_FOLDERS:
            if (folder / name / rows[0].path).is_file():
                return folder / name
    return folder


def _matches(spec: str) -> bool:
    """Tell whether a spec is such a folder; where there is a folder ``train``, too, the images lie in class folders."""
    folder = Path(spec).expanduser()
    return bool(spec) and (folder / _FILES["train"]).is_file() and not (folder / "train").is_dir()


FORMAT: Final = Format(
    spelling="DIR",
    matches=_matches,
    locate=lambda spec: Address(path=Path(spec)),
    read=read_split_folder,
)
