"""What is measured: an artifact on a runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vpdeploy.backends.description import RuntimeDescription
from vpdeploy.session.batch_size import BatchSize

Kind = Literal["bundle", "folded model", "ONNX file"]
"""What was loaded; an ONNX file is one that another tool exported."""

BatchRun = Callable[[], object]
"""Runs one batch and waits for its logits; what it returns is not looked at."""


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
class SubjectFacts:
    """What was loaded to be measured.

    Attributes:
        name: What the report calls it.
        kind: Whether it is a bundle, a folded model or a foreign file.
        path: What the user named.
        opset: ONNX opset of the graph; None where the file does not say.
        graph_bytes: Size of the ONNX file and its data file, in bytes.
        input: Element type of the images, as NumPy names it.
        tasks: Tasks that a mix can choose from.
        copied_tasks: How many of them are copies that fill the table up.
        runtime: The runtime, and why it was chosen.
        precision: Type of the weights; None where the file does not say.
        image_size: Height and width of an image, in pixels.
        slots: Slots of the session's table; None of a foreign file.
        slot_bytes: What one more task takes, in bytes; None of a foreign file.
        table_bytes: What all slots take, in bytes; 0 where there is no table.
        batch_size: What ``serve`` measured as the best batch size here, with the reason; None where it did not yet.
    """

    name: str
    kind: Kind
    path: str
    opset: int | None
    graph_bytes: int
    input: str
    tasks: int
    copied_tasks: int
    runtime: RuntimeDescription
    precision: str | None
    image_size: tuple[int, int]
    slots: int | None = None
    slot_bytes: int | None = None
    table_bytes: int = 0
    batch_size: BatchSize | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON form; square images have one number for their size."""
        height, width = self.image_size
        table = {"slots": self.slots, "slot_bytes": self.slot_bytes, "table_bytes": self.table_bytes}
        return {
            "name": self.name,
            "kind": self.kind,
            "path": self.path,
            "opset": self.opset,
            "graph_bytes": self.graph_bytes,
            "input": self.input,
            "tasks": self.tasks,
            "copied_tasks": self.copied_tasks,
            **self.runtime.to_json(),
            "precision": self.precision,
            "image_size": height if height == width else [height, width],
            **{title: value for title, value in table.items() if value is not None},
            **({} if self.batch_size is None else {"batch_size": self.batch_size.to_json()}),
        }


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

    def prepare(self, cell: Cell, seed: int) -> BatchRun:
        """Return a callable that runs one batch; inputs are made now, not while it runs.

        Raises:
            SpecError: The mix cannot be made of its tasks.
        """
        ...

    def facts(self) -> SubjectFacts:
        """Return what was loaded, for the report."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...
