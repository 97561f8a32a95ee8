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


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where the time of one run went, as the runtime itself measured it.

    Attributes:
        host_s: On the CPU, in s.
        device_s: On the GPU, in s.
    """

    host_s: float
    device_s: float


Run = Callable[[], Split | None]
"""Runs one batch and waits for its logits; returns the split of its time where the runtime tells it, else None."""


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
