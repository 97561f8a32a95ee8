"""What an export needs of a form, from the first refusal to the published files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from vpdeploy.format.artifact import Artifact
from vpdeploy.format.datafile import DataFile
from vpdeploy.format.graphfacts import GraphFacts, ImageInput, Precision
from vpdeploy.format.place import Existing
from vpdeploy_export.models import CompiledModel, TrainedModel
from vpdeploy_export.parity import ParityReport
from vpdeploy_export.precision.islands import Islands
from vpdeploy_export.precision.probe import ProbedGraph

TORCH_DTYPES: Final[dict[Precision, torch.dtype]] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class Assembly(Protocol):
    """Compiled models in one form: its graph, and what becomes of it once it is written."""

    @property
    def image_input(self) -> ImageInput:
        """The form of the graph's ``image`` input."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the table's axes, to count the graph's work with."""
        ...

    def prompt_bytes(self, precision: Precision) -> dict[str, int]:
        """Return what each task's prompts and head take in a graph of that precision, by task."""
        ...

    def probed_graph(self) -> ProbedGraph:
        """Return the float32 graph, written as its parts, that a probe watches; it takes uint8 images."""
        ...

    def probe_inputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield what the probed graph is run on: every task's images, with its prompts."""
        ...

    def trace(self, *, precision: Precision, opset: int, islands: Islands) -> ir.Model:
        """Return the ONNX model.

        Args:
            precision: The type of weights and matrix products.
            opset: The ONNX opset.
            islands: The parts that stay float32 in a narrower graph.

        Raises:
            ExportError: The graph cannot be expressed in ONNX.
        """
        ...

    def file_name(self, out: Path) -> str:
        """Return the name of the ONNX file that is going to be published at ``out``."""
        ...

    def staged(self, path: Path, facts: GraphFacts, data: DataFile | None) -> Artifact:
        """Return the written graph as what it is going to be, so that the gate can run it.

        Args:
            path: The ONNX file.
            facts: What is recorded of it.
            data: Its data file, or None.
        """
        ...

    def publish(self, staged: Artifact, reports: Sequence[ParityReport], out: Path, existing: Existing) -> int:
        """Add the reports to the cards and put everything in its place, wholly or not at all.

        Args:
            staged: What passed the gate.
            reports: One for each task.
            out: Where it goes.
            existing: What is to become of what is there: it may have come since ``check``.

        Returns:
            The size in bytes of the graph's files.

        Raises:
            BundleError: ``out`` cannot be written.
            OSError: The disk is full.
        """
        ...


class DeployedForm(Protocol):
    """A form of deployment; an object of it carries the options that belong to it alone."""

    def check(self, models: Sequence[TrainedModel], out: Path, existing: Existing) -> None:
        """Refuse models that do not go together and places that cannot be written, before anything is loaded.

        Raises:
            SpecError: The models do not go together in this form, or it cannot be updated.
            BundleError: What lies at ``out`` must not be touched so.
        """
        ...

    def check_update(
        self, models: Sequence[TrainedModel], out: Path, *, precision: Precision | None, opset: int | None
    ) -> None:
        """Refuse what does not fit into what is updated; the models passed ``check``.

        Raises:
            SpecError: Another graph was asked for than there is.
            LayoutMismatchError: A model belongs to another backbone or preprocessing.
        """
        ...

    def assemble(self, models: Sequence[CompiledModel], precision: Precision) -> Assembly:
        """Bring compiled models into this form.

        Args:
            models: They passed ``check``.
            precision: The type of prompts that are not part of the graph.

        Raises:
            SpecError: The prompts do not fit the form.
            ExportError: They do not fit the precision.
        """
        ...
