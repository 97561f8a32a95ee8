"""Settings by name, as files and the command line give them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpdeploy.errors import SpecError
from vpdeploy.toml import parse_toml


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
