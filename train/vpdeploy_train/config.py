"""Settings by name, as files and the command line give them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vpdeploy.errors import SpecError


class SharedSettings(dict[str, Any]):
    """Settings by name that several methods share: a run leaves out those that its method does not know."""


class FileSettings(SharedSettings):
    """Settings by name together with the file they were read from, which messages name.

    Args:
        values: The settings by name.
        file: The file that they were read from.
    """

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        super().__init__(values)
        self.file = file


def read_toml(path: Path) -> FileSettings:
    """Read settings from a TOML file.

    Raises:
        SpecError: The file is missing or is not TOML.
    """
    try:
        return FileSettings(parse_toml(path.read_text(encoding="utf-8")), path)
    except FileNotFoundError:
        raise SpecError(f"{path}: file not found") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: not a readable TOML file: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Return what a TOML text says.

    Raises:
        ValueError: It is not TOML.
    """
    # Imported here: the command line reads this module's options without the extra installed.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def name_advice(name: str, known: list[str]) -> str:
    """Return what may have been meant by the name of a setting."""
    close = get_close_matches(name.replace("-", "_").lower(), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(known)}"
