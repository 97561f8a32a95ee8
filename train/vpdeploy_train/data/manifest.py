"""Manifests: ``FILE.csv``, ``FILE.json`` or ``FILE.jsonl`` with a path, a label and perhaps a split for each image."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vpdeploy.errors import SpecError
from vpdeploy_train.data.address import Address
from vpdeploy_train.data.collection import UNSPLIT, Collection, Format, Item
from vpdeploy_train.data.listing import listed
from vpdeploy_train.data.rows import Row, read_csv_rows, read_json_rows, read_jsonl_rows
from vpdeploy_train.data.splitnames import SPLIT_NAMES, split_named

_log = logging.getLogger("vpdeploy.train")

_READERS: Final = {".csv": read_csv_rows, ".json": read_json_rows, ".jsonl": read_jsonl_rows}


def read_manifest(spec: str) -> Collection:
    """Read a manifest; its paths are relative to the folder it lies in.

    Either every row names a split or none does. A row that repeats another is dropped with one warning.

    Raises:
        SpecError: The manifest cannot be read, a row is incomplete or contradicts another, or a file is missing.
    """
    path = Path(spec).expanduser()
    rows = _READERS[path.suffix.lower()](read_text(path))
    try:
        return collect(path.parent, rows)
    except SpecError as error:
        raise SpecError(f"{spec}: {error}") from None


def collect(folder: Path, rows: Iterable[Row]) -> Collection:
    """Collect the images of a manifest's rows.

    Args:
        folder: What their paths are relative to.
        rows: Either all with a split or none.

    Raises:
        SpecError: A row is incomplete or contradicts another, or a file is missing; the manifest is not named.
    """
    placed = _place(folder, rows)
    if not placed:
        raise SpecError("no rows; expected one for each image, with the fields path, label and maybe split")
    missing = [source for source in listed(placed, total=len(placed)) if not is_file(source)]
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(placed)} files are missing, the first is {str(missing[0])[:200]}: "
            f"paths are relative to {folder.resolve()}"
        )
    splits: dict[str, list[Item]] = {}
    for source, (label, split, _) in placed.items():
        splits.setdefault(split, []).append(Item(source=source, class_name=label))
    return Collection(splits={split: tuple(items) for split, items in splits.items()}, augmentation="crop-flip")


def read_text(path: Path) -> str:
    """Read a manifest's text: UTF-8 with or without a byte-order mark, or UTF-16 with one.

    Raises:
        SpecError: The file cannot be read, or is in another encoding.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"{path}: file not found") from None
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper().replace("_", "-")
        raise SpecError(f"{path}: not {encoding} (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error


def is_file(path: Path) -> bool:
    """Tell whether a file is there; a name too long for the system is no file's."""
    try:
        return path.is_file()
    except OSError:
        return False


def _place(folder: Path, rows: Iterable[Row]) -> dict[Path, tuple[str, str, str]]:
    """Return each file's label, split and place in the manifest, in the manifest's order."""
    placed: dict[Path, tuple[str, str, str]] = {}
    repeated = 0
    first: Row | None = None
    for row in listed(rows):
        first = first or row
        if (row.split is None) != (first.split is None):
            raise SpecError(f"{row.place} and {first.place} differ: expected a split in every row or in none")
        split = UNSPLIT if row.split is None else split_named(row.split)
        if split is None:
            raise SpecError(f"{row.place}: unknown split '{row.split}'; expected {', '.join(SPLIT_NAMES)}")
        source = folder / row.path
        if "\\" in row.path and not is_file(source):  # as Windows writes paths
            source = folder / row.path.replace("\\", "/")
        if source in placed:
            label, earlier_split, place = placed[source]
            if label != row.label:
                raise SpecError(f"{row.path} is '{label}' in {place} and '{row.label}' in {row.place}: keep one label")
            if earlier_split != split:
                raise SpecError(
                    f"{row.path} is in split '{earlier_split}' ({place}) and in '{split}' ({row.place}): keep one"
                )
            repeated += 1
            continue
        placed[source] = (row.label, split, row.place)
    if repeated:
        _log.warning("%d rows of the manifest in %s repeat another and are dropped", repeated, folder)
    return placed


FORMAT: Final = Format(
    spelling="FILE.csv|json|jsonl",
    # A folder may be called so, too.
    matches=lambda spec: Path(spec).suffix.lower() in _READERS and not Path(spec).expanduser().is_dir(),
    locate=lambda spec: Address(path=Path(spec)),
    read=read_manifest,
)
