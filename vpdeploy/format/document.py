"""JSON documents read strictly: every field is checked, every complaint names the file and the field."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vpdeploy.errors import BundleCorruptError, BundleVersionError

_T = TypeVar("_T")


class Document:
    """A JSON object together with the name of the file it came from.

    Args:
        source: What to call the document in an error, normally its path.
        fields: The decoded JSON object.
    """

    def __init__(self, source: str, fields: Mapping[str, Any]) -> None:
        self.source = source
        self.fields = fields

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read a JSON file.

        Raises:
            BundleCorruptError: The file is missing, unreadable or not a JSON object.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BundleCorruptError(f"{path}: file is missing; restore it or export again") from None
        except OSError as error:
            raise BundleCorruptError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise BundleCorruptError(f"{path}: cannot be read: {error}") from error
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str) -> Document:
        """Decode a JSON object from text.

        Raises:
            BundleCorruptError: The text is not a JSON object.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise BundleCorruptError(f"{source}: not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise BundleCorruptError(f"{source}: expected a JSON object, found {type(fields).__name__}")
        return cls(source, fields)

    def take(self, name: str, kind: type[_T]) -> _T:
        """Return field ``name``, which must be of the given type (an int serves as a float; floats are finite).

        Raises:
            BundleCorruptError: The field is missing, of another type, or not finite.
        """
        if name not in self.fields:
            raise BundleCorruptError(f"{self.source}: field '{name}' is missing")
        return _checked(self.fields[name], kind, f"{self.source}: field '{name}'")

    def take_list(self, name: str, kind: type[_T]) -> list[_T]:
        """Return field ``name``, a list whose items are all of the given type.

        Raises:
            BundleCorruptError: The field is missing, or an item has another type.
        """
        items = self.take(name, list)
        return [_checked(item, kind, f"{self.source}: field '{name}[{index}]'") for index, item in enumerate(items)]

    def nested(self, name: str) -> Document:
        """Return field ``name``, a JSON object, as a document of its own.

        Raises:
            BundleCorruptError: The field is missing or not an object.
        """
        return Document(f"{self.source}: {name}", self.take(name, dict))

    def expect_format(self, name: str, *versions: int) -> int:
        """Check the fields ``format`` and ``format_version``, before any other field is looked at.

        Args:
            name: The kind of document.
            versions: Those that are read here.

        Returns:
            The document's version.

        Raises:
            BundleCorruptError: The document is of another kind.
            BundleVersionError: The document is of a version that is not read here.
        """
        found = self.take("format", str)
        if found != name:
            raise BundleCorruptError(f"{self.source}: expected format '{name}', found '{found}'")
        found_version = self.take("format_version", int)
        if found_version not in versions:
            raise BundleVersionError(
                f"{self.source}: format version {found_version} is not readable, expected "
                f"{' or '.join(map(str, versions))}; use the vpdeploy that wrote it or export again"
            )
        return found_version


def _checked(value: Any, kind: type[_T], place: str) -> _T:
    """Return a value after comparing its type; JSON's integers serve as floats, its booleans not as integers."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # left an int, which is refused below
            value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BundleCorruptError(f"{place} should be {kind.__name__}, found {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleCorruptError(f"{place} should be a finite number, found {value}")
    return value


def to_json(fields: Mapping[str, Any]) -> str:
    """Encode a document the way vpdeploy writes them all: indented, sorted as given, newline at the end."""
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
