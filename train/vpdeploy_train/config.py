"""Settings by name, as files and the command line give them: reading, and types."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vpdeploy.errors import SpecError


class FileSettings(dict[str, Any]):
    """Settings by name, and the file they were read from, which messages name.

    Args:
        values: The settings.
        file: The file.
    """

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        super().__init__(values)
        self.file = file


def read_toml(path: Path) -> FileSettings:
    """Read settings from a TOML file.

    Raises:
        SpecError: The file is missing or is not TOML.
    """
    # Imported here: the command line reads this module's options without the extra installed.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return FileSettings(tomllib.loads(path.read_text(encoding="utf-8")), path)
    except FileNotFoundError:
        raise SpecError(f"{path}: file not found") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not a readable TOML file: {error}") from error


def checked_value(name: str, value: Any, annotation: str, *, origin: str) -> Any:
    """Return a value from a file or the command line if a setting may have it by its type.

    Args:
        name: The setting.
        value: An integer serves as a float.
        annotation: The setting's annotation.
        origin: Stands before the message.

    Raises:
        SpecError: The value is of another type.
    """
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise SpecError(f"{origin}--{name.replace('_', '-')}: the number is too large") from None
    expected = {"int": int, "float": float, "bool": bool}.get(kinds[0], str)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise SpecError(f"{origin}--{name.replace('_', '-')}: expected {expected.__name__}, found {value!r}")
    return value


def name_advice(name: str, known: list[str]) -> str:
    """Return what may have been meant by the name of a setting."""
    close = get_close_matches(name.replace("-", "_").lower(), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(known)}"
