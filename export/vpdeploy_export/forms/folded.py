"""The folded form: one task as a self-contained ONNX file, its prompts and head constants of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.datafile import DataFile, graph_size_bytes, move_graph
from vpdeploy.format.folded import FoldedCard
from vpdeploy.format.graphfacts import GraphFacts, ImageInput, Precision
from vpdeploy.format.onnxfile import append_metadata
from vpdeploy.format.place import Existing, check_file_place
from vpdeploy_export.compilation import deployed_trunk
from vpdeploy_export.forms.form import TORCH_DTYPES
from vpdeploy_export.graph import FoldedGraph
from vpdeploy_export.models import CompiledModel, TrainedModel
from vpdeploy_export.onnx.trace import build_folded
from vpdeploy_export.parity import ParityReport
from vpdeploy_export.precision.decision import PROBE_OPSET, pixel_batches
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands
from vpdeploy_train.trunks import Trunk


@dataclass(frozen=True, kw_only=True)
class Folded:
    """One task in one ONNX file.

    Example:
        >>> target = vpdeploy_export.Folded(image_input="float")
        >>> model = vpdeploy_export.TrainedModel.of_run(flowers_run)
        >>> vpdeploy_export.export_model([model], Path("normalised.onnx"), target=target).path.name
        'normalised.onnx'

    Attributes:
        image_input: Form of the graph's ``image`` input: ``uint8`` pixels, or ``float`` images that are normalised.
    """

    image_input: ImageInput = "uint8"

    def check(self, models: Sequence[TrainedModel], out: Path, existing: Existing) -> None:
        """Refuse what does not go together in this form, before anything is loaded; see ``DeployedForm.check``.

        Args:
            models: The models.
            out: Where they are going to be written.
            existing: What is to become of a file that is there.

        Raises:
            SpecError: The models do not go together, or a file should be updated.
            BundleError: ``out`` is something else, or another task's model.
        """
        if len(models) != 1:
            raise SpecError(f"a folded model holds one task, {len(models)} were given; export a bundle for several")
        check_file_place(out, models[0].card.name, existing)

    def check_update(
        self, models: Sequence[TrainedModel], out: Path, *, precision: Precision | None, opset: int | None
    ) -> None:
        """Accept: ``check`` has refused an update of a file; see ``DeployedForm.check_update``.

        Args:
            models: The model.
            out: The file.
            precision: The one that was asked for.
            opset: The one that was asked for.
        """

    def assemble(self, models: Sequence[CompiledModel], precision: Precision) -> FoldedAssembly:
        """Return a compiled model in this form; see ``DeployedForm.assemble``.

        Args:
            models: The one model.
            precision: Unused: the prompts are part of this graph, and typed with it.
        """
        (compiled,) = models
        return FoldedAssembly(compiled=compiled, trunk=deployed_trunk(compiled.model), image_input=self.image_input)


@dataclass(frozen=True, kw_only=True)
class FoldedAssembly:
    """One compiled model; see ``Assembly`` for what its methods are for.

    Attributes:
        compiled: The model.
        trunk: The backbone that is deployed.
        image_input: Form of the graph's ``image`` input.
    """

    compiled: CompiledModel
    trunk: Trunk
    image_input: ImageInput

    @property
    def sizes(self) -> Mapping[str, int]:
        """See ``Assembly.sizes``; there is no table."""
        return {}

    def prompt_bytes(self, precision: Precision) -> dict[str, int]:
        """See ``Assembly.prompt_bytes``."""
        prompts, head = self.compiled.prompts, self.compiled.model.head
        numbers = sum(array.size for array in (prompts.inserted, prompts.pooled) if array is not None)
        for block in prompts.blocks:
            made = block.generator
            numbers += block.key.size + block.value.size
            if made is not None:
                numbers += sum(array.size for array in (made.mix, made.scale, made.shift, made.down, made.up))
        size_bytes = numbers * (4 if precision == "fp32" else 2) + sum(each.numel() * 4 for each in head.parameters())
        return {self.compiled.card.name: size_bytes}

    def probed_graph(self) -> FoldedGraph:
        """See ``Assembly.probed_graph``."""
        return self._graph(torch.float32, "uint8", PROBE_OPSET, NO_ISLANDS)

    def probe_inputs(self) -> Iterator[tuple[Tensor, ...]]:
        """See ``Assembly.probe_inputs``."""
        return ((pixels,) for pixels in pixel_batches(self.compiled.expectation))

    def trace(self, *, precision: Precision, opset: int, islands: Islands) -> ir.Model:
        """See ``Assembly.trace``."""
        graph = self._graph(TORCH_DTYPES[precision], self.image_input, opset, islands)
        return build_folded(graph, self.compiled.card.preprocessing, opset=opset)

    def file_name(self, out: Path) -> str:
        """See ``Assembly.file_name``; a data file is named for it."""
        return out.name

    def staged(self, path: Path, facts: GraphFacts, data: DataFile | None) -> Artifact:
        """See ``Assembly.staged``."""
        return Artifact.of_folded(path, FoldedCard(task=self.compiled.card, graph=facts), data=data)

    def publish(self, staged: Artifact, reports: Sequence[ParityReport], out: Path, existing: Existing) -> int:
        """See ``Assembly.publish``; the card goes into the file that the gate ran, whose weights stay as they lie."""
        (report,) = reports
        check_file_place(out, self.compiled.card.name, existing)
        card = replace(self.compiled.card, details={**self.compiled.card.details, "parity": report.to_fields()})
        append_metadata(staged.graph_path, FoldedCard(task=card, graph=staged.graph).to_metadata())
        move_graph(staged.graph_path, out)
        return graph_size_bytes(out)

    def _graph(self, dtype: torch.dtype, image_input: ImageInput, opset: int, islands: Islands) -> FoldedGraph:
        return FoldedGraph(
            self.trunk,
            self.compiled.card.preprocessing,
            self.compiled.prompts,
            self.compiled.model.head,
            dtype=dtype,
            image_input=image_input,
            opset=opset,
            islands=islands,
        )
