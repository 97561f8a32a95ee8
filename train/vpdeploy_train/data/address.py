"""Where the data of a spec lie: specs with absolute paths, and specs that name the same place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Address:
    """A spec taken apart at the path in it.

    Attributes:
        before: What stands before the path, such as ``vtab:``.
        path: A folder or file, perhaps relative, perhaps beginning with ``~``.
        after: What stands behind the path, such as ``?image=photo``.
    """

    before: str = ""
    path: Path
    after: str = ""

    @property
    def place(self) -> Path:
        """The path with ``~`` replaced, where there is such a user."""
        try:
            return self.path.expanduser()
        except RuntimeError:
            return self.path

    @property
    def exists(self) -> bool:
        """Whether there is a folder or file of that name."""
        try:
            return self.place.exists()
        except OSError:  # a name too long for the system, or in a folder that may not be looked into
            return False

    @property
    def is_lost(self) -> bool:
        """Whether the path is relative, and not to the present directory."""
        return not self.place.is_absolute() and not self.exists

    def ends_like(self, other: Address) -> bool:
        """Tell whether the path, from the root, ends with another's, and the rest is the same."""
        end = Path(os.path.normpath(other.path)).parts
        return (self.before, self.after) == (other.before, other.after) and self.place.resolve().parts[
            -len(end) :
        ] == end

    def absolute(self) -> str:
        """Return the spec with an absolute path; symbolic links stay as they are, as the user may move them on."""
        return f"{self.before}{absolute_path(self.path)}{self.after}"

    def resolved(self) -> str:
        """Return the spec as every spelling of the same place has it."""
        return f"{self.before}{self.place.resolve()}{self.after}"


def absolute_path(path: Path) -> Path:
    """Return a path from the root, without ``~``, and without ``..`` where leaving it out names the same place."""
    absolute = path.expanduser().absolute()
    plain = Path(os.path.normpath(absolute))
    return plain if plain.resolve() == absolute.resolve() else absolute
