"""What is measured: an artifact on a runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one row of the report is about.

    Attributes:
        batch: Images in a batch, B.
        mix: A key of ``vpdeploy.bench.mixes.MIXES``.
    """

    batch: int
    mix: str


Run = Callable[[], object]
"""Runs one batch and waits for its logits; what it returns is not looked at."""


class Subject(Protocol):
    """An artifact that was loaded to be measured."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def tasks(self) -> int:
        """How many tasks a mix can choose from."""
        ...

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size it takes, or None where it takes any."""
        ...

    def prepare(self, cell: Cell, seed: int) -> Run:
        """Return a callable that runs one batch; inputs are made now, not while it runs.

        Raises:
            SpecError: The mix cannot be made of its tasks.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Return what was loaded, for the report: file, runtime, precision, sizes."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...
