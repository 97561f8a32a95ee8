"""The rows of a manifest, in each of its three forms."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vpdeploy.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a manifest.

    Attributes:
        place: Where the row stands, for messages: ``line 3`` or ``entry 3``.
        path: The image's path as written.
        label: The name of its class.
        split: The split as written; None where the manifest names none.
    """

    place: str
    path: str
    label: str
    split: str | None


def read_csv_rows(text: str) -> Iterator[Row]:
    """Read rows below a header that names ``path`` and ``label`` and perhaps ``split``.

    They are separated by commas, or by semicolons or tabs, as spreadsheets write them, where the header is. A header
    that is repeated, as between files that were joined, is passed over.

    Raises:
        SpecError: The header is another one, or a row is incomplete or too long.
    """
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = next((each for each in ",;\t" if {"path", "label"} <= set(_names(first.split(each)))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = _names(next(reader, []))
        if not {"path", "label"} <= set(header):
            raise SpecError(f"the header is '{','.join(header)}'; expected path,label or path,label,split")
        if twice := {"path", "label", "split"} & {name for name in header if header.count(name) > 1}:
            raise SpecError(f"the header names '{min(twice)}' twice: keep one of these columns")
        for values in reader:
            if not any(value.strip() for value in values) or _names(values) == header:
                continue
            place = f"line {reader.line_num}"
            if len(values) > len(header):
                raise SpecError(
                    f"{place} has {len(values)} fields; expected {len(header)}: quote fields that hold a {delimiter!r}"
                )
            yield _to_row(place, dict(zip(header, values, strict=False)))
    except csv.Error as error:
        raise SpecError(f"line {reader.line_num} is not CSV ({error})") from None


def read_json_rows(text: str) -> Iterator[Row]:
    """Read a JSON list of objects with ``path``, ``label`` and perhaps ``split``, or one object ``{path: label}``.

    Raises:
        SpecError: It is not JSON, or another structure, or an entry is incomplete.
    """
    document = _parse("the manifest", text)
    if isinstance(document, _Pairs):
        for number, (path, label) in enumerate(document, start=1):
            yield _to_row(f"entry {number}", {"path": path, "label": label})
    elif isinstance(document, list):
        for number, entry in enumerate(document, start=1):
            yield _to_row(f"entry {number}", _to_fields(f"entry {number}", entry))
    else:
        raise SpecError("expected a JSON list of objects or one object of the form {path: label}")


def read_jsonl_rows(text: str) -> Iterator[Row]:
    """Read one JSON object with ``path``, ``label`` and perhaps ``split`` from each line.

    Raises:
        SpecError: A line is not a JSON object or is incomplete.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number}"
            yield _to_row(place, _to_fields(place, _parse(place, line)))


def _names(header: Iterable[str]) -> list[str]:
    """Return the names of columns, which may be quoted."""
    return [name.strip().strip('"').strip().lower() for name in header]


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated keys kept."""


def _parse(place: str, text: str) -> Any:
    """Parse JSON."""
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{place} is not JSON ({error})") from None


def _to_fields(place: str, entry: Any) -> Mapping[str, Any]:
    """Return the fields of a JSON object."""
    if not isinstance(entry, _Pairs):
        raise SpecError(f'{place} is not an object; expected {{"path": ..., "label": ...}}')
    return dict(entry)


def _to_row(place: str, fields: Mapping[str, Any]) -> Row:
    """Check the fields of a row."""
    split = fields.get("split")
    return Row(
        place=place,
        path=_take(place, fields, "path"),
        label=_take(place, fields, "label"),
        split=None if split is None or split == "" else _take(place, fields, "split"),
    )


def _take(place: str, fields: Mapping[str, Any], name: str) -> str:
    """Return a field as text; whole numbers are welcome as labels."""
    value = fields.get(name)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if name == "label" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = "nothing" if value is None or value == "" else repr(value)
    raise SpecError(f"{place}: no usable {name}; expected text, found {found}")
