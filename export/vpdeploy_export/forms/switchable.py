"""The switchable form: a bundle of one shared graph, and a compiled prompt set for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from vpdeploy.errors import SpecError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import replace_bundle, write_bundle
from vpdeploy.format.datafile import DataFile, graph_size_bytes
from vpdeploy.format.graphfacts import GraphFacts, ImageInput, Precision
from vpdeploy.format.layout import SLOT_AXIS, Family, Layout
from vpdeploy.format.manifest import GRAPH_FILE, BundleFacts
from vpdeploy.format.place import Existing, check_bundle_place, check_update
from vpdeploy.format.promptset import CompiledPromptSet
from vpdeploy.table import Table, common_sizes
from vpdeploy.text import differing
from vpdeploy_export.forms.form import TORCH_DTYPES
from vpdeploy_export.graph import SwitchableGraph
from vpdeploy_export.models import CompiledModel, TrainedModel
from vpdeploy_export.onnx.trace import build_switchable
from vpdeploy_export.packing import check_switchable, choose_layout, pack, with_details
from vpdeploy_export.parity import ParityReport
from vpdeploy_export.precision.decision import PROBE_OPSET, pixel_batches
from vpdeploy_export.precision.islands import NO_ISLANDS, Islands
from vpdeploy_train.methods import method_of_run


@dataclass(frozen=True, kw_only=True)
class Switchable:
    """Tasks of one backbone in one bundle.

    Example:
        >>> models = vpdeploy_export.TrainedModel.of_runs([flowers_run, birds_run])
        >>> report = vpdeploy_export.export_model(models, Path("shared"), target=vpdeploy_export.Switchable())
        >>> vpdeploy.load(report.path).tasks
        ('flowers', 'birds')

    Attributes:
        family: Kinds of prompts that the graph has place for; None takes what the models need.
    """

    family: Family | None = None

    def check(self, models: Sequence[TrainedModel], out: Path, existing: Existing) -> None:
        """Refuse what does not go together in this form, before anything is loaded; see ``DeployedForm.check``.

        Args:
            models: The models.
            out: Where they are going to be written.
            existing: What is to become of a bundle that is there.

        Raises:
            SpecError: The models do not go together.
            BundleError: ``out`` is something else, or a bundle that would lose what it holds.
        """
        if not models:
            raise SpecError("a bundle holds one task or more, none was given")
        check_bundle_place(out, [model.card.name for model in models], existing)
        _require_one_graph(models)

    def check_update(
        self, models: Sequence[TrainedModel], out: Path, *, precision: Precision | None, opset: int | None
    ) -> None:
        """Refuse what does not fit into a bundle's graph; see ``DeployedForm.check_update``.

        Args:
            models: The models.
            out: The bundle.
            precision: The one that was asked for; None is the bundle's.
            opset: The one that was asked for; None is the bundle's.

        Raises:
            BundleError: The bundle cannot be read.
            SpecError: Another graph was asked for than the bundle has.
            LayoutMismatchError: A model belongs to another backbone or preprocessing.
        """
        cards = [model.card for model in models]
        check_update(out, cards, precision=precision, opset=opset, family=self.family)

    def assemble(self, models: Sequence[CompiledModel], precision: Precision) -> SwitchableAssembly:
        """Return compiled models in one layout; see ``DeployedForm.assemble``.

        Args:
            models: The models, on one backbone.
            precision: The type of the table.
        """
        for each in models:
            check_switchable(each.prompts, each.card)
        trunk, identity = models[0].model.trunk, models[0].card.backbone
        compiled = {each.card.name: each.prompts for each in models}
        layout = choose_layout(compiled, identity, trunk, precision=precision, family=self.family)
        return SwitchableAssembly(
            models=tuple(models),
            layout=layout,
            prompt_sets=tuple(pack(each.prompts, each.model.head, each.card, layout, trunk) for each in models),
        )


@dataclass(frozen=True, kw_only=True)
class SwitchableAssembly:
    """Compiled models in one layout; see ``Assembly`` for what its methods are for.

    Attributes:
        models: The models, on one backbone.
        layout: Of the table's inputs.
        prompt_sets: One for each model, in that layout.
    """

    models: tuple[CompiledModel, ...]
    layout: Layout
    prompt_sets: tuple[CompiledPromptSet, ...]

    @property
    def image_input(self) -> ImageInput:
        """See ``Assembly.image_input``."""
        return "uint8"

    @property
    def sizes(self) -> Mapping[str, int]:
        """See ``Assembly.sizes``."""
        shared = common_sizes([prompt_set.sizes() for prompt_set in self.prompt_sets])
        return {**shared, SLOT_AXIS: len(self.prompt_sets)}

    def prompt_bytes(self, precision: Precision) -> dict[str, int]:
        """See ``Assembly.prompt_bytes``."""
        return {prompt_set.card.name: prompt_set.size_bytes for prompt_set in self.prompt_sets}

    def probed_graph(self) -> SwitchableGraph:
        """See ``Assembly.probed_graph``."""
        return self._graph(torch.float32, PROBE_OPSET, NO_ISLANDS)

    def probe_inputs(self) -> Iterator[tuple[Tensor, ...]]:
        """See ``Assembly.probe_inputs``."""
        table = Table.of(self.prompt_sets)
        arrays = [torch.from_numpy(table.arrays[spec.name]) for spec in self.layout.tensors]
        for slot, each in enumerate(self.models):
            for pixels in pixel_batches(each.expectation):
                yield pixels, torch.full((len(pixels),), slot, dtype=torch.int32), *arrays

    def trace(self, *, precision: Precision, opset: int, islands: Islands) -> ir.Model:
        """See ``Assembly.trace``."""
        graph = self._graph(TORCH_DTYPES[precision], opset, islands)
        return build_switchable(graph, self.models[0].card.preprocessing, self.layout, opset=opset)

    def file_name(self, out: Path) -> str:
        """See ``Assembly.file_name``."""
        return GRAPH_FILE

    def staged(self, path: Path, facts: GraphFacts, data: DataFile | None) -> Artifact:
        """See ``Assembly.staged``."""
        return Artifact.of_staged(path, self._facts(facts), self.prompt_sets, data=data)

    def publish(self, staged: Artifact, reports: Sequence[ParityReport], out: Path, existing: Existing) -> int:
        """See ``Assembly.publish``."""
        size_bytes = graph_size_bytes(staged.graph_path)
        published = [
            with_details(prompt_set, parity=report.to_fields())
            for prompt_set, report in zip(self.prompt_sets, reports, strict=True)
        ]
        write = replace_bundle if existing == "replace" else write_bundle
        write(out, self._facts(staged.graph), published, staged.graph_path, data=staged.data)
        return size_bytes

    def _facts(self, graph: GraphFacts) -> BundleFacts:
        card = self.models[0].card
        return BundleFacts(backbone=card.backbone, preprocessing=card.preprocessing, layout=self.layout, graph=graph)

    def _graph(self, dtype: torch.dtype, opset: int, islands: Islands) -> SwitchableGraph:
        first = self.models[0]
        return SwitchableGraph(
            first.model.trunk, first.card.preprocessing, self.layout, dtype=dtype, opset=opset, islands=islands
        )


def require_prompts(model: TrainedModel) -> None:
    """Refuse a model whose method leaves its mark on the backbone.

    Raises:
        SpecError: The task cannot share a graph; the message says what to do.
    """
    if method_of_run(model.card.method).form == "weights":
        raise SpecError(
            f"{model.origin}: method '{model.card.method}' changes the backbone's weights, so the task cannot share a "
            "graph with others; export it alone as FILE.onnx, or train prompts"
        )


def _require_one_graph(models: Sequence[TrainedModel]) -> None:
    """Refuse models that one graph cannot serve, by name.

    Raises:
        SpecError: Different backbones, sizes or normalisation, or the same task name twice.
    """
    first = models[0]
    seen: dict[str, str] = {}
    for model in models:
        require_prompts(model)
        name, both = model.card.name, f"{first.origin} and {model.origin}"
        if name in seen:
            raise SpecError(f"{seen[name]} and {model.origin} are both task '{name}'; train one with another --name")
        seen[name] = model.origin
        mine, other = first.card.backbone, model.card.backbone
        if other.name != mine.name:
            raise SpecError(
                f"{both} have different backbones: {mine.name} and {other.name}; export them into two bundles"
            )
        if difference := first.card.preprocessing.difference(model.card.preprocessing):
            raise SpecError(f"{both} preprocess differently: {difference}; export them into two bundles")
        if other.sha256 != mine.sha256:
            digests = " and ".join(differing(mine.sha256, other.sha256))
            raise SpecError(f"{both} have different weights of {other.name} ({digests}); export them into two bundles")
