"""From trained models to what is deployed: compile, write aside, compare, and only then put in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vpdeploy.errors import BundleError, LayoutMismatchError
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, publish_tasks
from vpdeploy.format.graphfacts import GraphFacts, Precision
from vpdeploy.format.place import Existing, check_update
from vpdeploy.format.task import TaskCard
from vpdeploy.text import shell_path
from vpdeploy_export.forms import DeployedForm
from vpdeploy_export.forms.switchable import require_prompts
from vpdeploy_export.models import CompiledModel, TrainedModel
from vpdeploy_export.onnx.facts import graph_facts
from vpdeploy_export.onnx.save import save_model, staging_folder
from vpdeploy_export.onnx.trace import check_opset
from vpdeploy_export.packing import pack, with_details
from vpdeploy_export.parity import ParityReport, require_parity
from vpdeploy_export.precision.decision import PrecisionReport, probe_graph
from vpdeploy_export.precision.gate import advise_addition, advise_export, run_gate
from vpdeploy_export.precision.islands import NO_ISLANDS

DEFAULT_OPSET: Final = 20

logger = logging.getLogger("vpdeploy.export")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Example:
        >>> models = vpdeploy_export.TrainedModel.of_runs([flowers_run])
        >>> report = vpdeploy_export.export_model(models, Path("small"), target=vpdeploy_export.Switchable())
        >>> report.precision, report.opset, list(report.prompt_bytes)
        ('fp32', 20, ['flowers'])

    Attributes:
        path: The file or folder.
        precision: Of the graph's weights and matrix products.
        opset: ONNX opset.
        size_bytes: Of the graph's file.
        parity: One report for each task.
        prompt_bytes: Compiled bytes by task.
        probe: Of a float16 or bfloat16 graph: the activations found, and what stays float32.
        versions: Of a bundle that was updated: the version of each task that is now served.
    """

    path: Path
    precision: Precision
    opset: int
    size_bytes: int
    parity: tuple[ParityReport, ...]
    prompt_bytes: dict[str, int]
    probe: PrecisionReport | None = None
    versions: Mapping[str, int] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "path": str(self.path),
            "precision": self.precision,
            "opset": self.opset,
            "size_bytes": self.size_bytes,
            "prompt_bytes": self.prompt_bytes,
            "versions": dict(self.versions),
            "parity": {report.task: report.to_fields() for report in self.parity},
            "probe": None if self.probe is None else self.probe.to_fields(),
        }


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A task that was added to a bundle.

    Attributes:
        version: The version that is now served.
        parity: The comparison with the trained model.
    """

    version: int
    parity: ParityReport


def export_model(
    models: Sequence[TrainedModel],
    out: Path,
    *,
    target: DeployedForm,
    existing: Existing = "refuse",
    precision: Precision | None = None,
    opset: int | None = None,
    images: Path | None = None,
) -> ExportReport:
    """Write trained models as what is deployed: a folded ONNX file, or a bundle.

    A bundle that is there already is not touched, unless ``existing`` says what is to become of it: ``update`` adds the
    models to it in its own graph, as new tasks or new versions, and keeps all else; ``replace`` drops what it holds. A
    folded file is replaced by one of the same task; ``replace`` lets it take the place of another task's.

    Args:
        models: One for a folded file; for a bundle of one backbone, image size and normalisation, and of different
            task names. ``TrainedModel.of_runs`` reads them from runs.
        out: The file or folder; it appears, or replaces what was there, only if the graph reproduces the models.
        target: ``Folded(...)`` or ``Switchable(...)``, with the options that belong to it.
        existing: What is to become of a bundle or model that is there.
        precision: ``fp16`` and ``bf16`` write a graph of that type; what would overflow it stays float32. None is that
            of the bundle that is updated, else ``fp32``.
        opset: One of ``OPSETS``; None is that of the bundle that is updated, else ``DEFAULT_OPSET``.
        images: A folder of images for the parity gate; None takes each model's own.

    Returns:
        What was written, with the comparison of every task.

    Raises:
        BundleError: A run is damaged, or ``out`` is something else, or would lose what it holds.
        SpecError: The models do not go together, options do not fit, or a backbone's weights cannot be had.
        LayoutMismatchError: A model does not fit the bundle that is updated.
        ExportError: The prompts do not fit the precision, or the graph cannot be written.
        ParityError: The graph does not reproduce a trained model; nothing is written.

    Example:
        A model of a run:

        >>> model = vpdeploy_export.TrainedModel.of_run(flowers_run)
        >>> report = vpdeploy_export.export_model([model], Path("flowers.onnx"), target=vpdeploy_export.Folded())
        >>> report.parity[0].passed
        True

        A model that is in memory:

        >>> from vpdeploy.format.preprocessing import Preprocessing
        >>> from vpdeploy.format.task import TaskCard
        >>> from vpdeploy_train.methods.method import NoPrompts
        >>> from vpdeploy_train.prompted import PromptedViT
        >>> backbone = vpdeploy_train.load_backbone("vit_mini_patch8_64")
        >>> card = TaskCard(
        ...     name="pets",
        ...     labels=("cat", "dog"),
        ...     method="linear",
        ...     backbone=backbone.identity,
        ...     preprocessing=Preprocessing(image_size=64, mean=backbone.mean, std=backbone.std),
        ... )
        >>> pets = vpdeploy_export.TrainedModel.of_model(PromptedViT(backbone.vit, NoPrompts(), classes=2), card)
        >>> target = vpdeploy_export.Switchable()
        >>> report = vpdeploy_export.export_model([pets], Path("pets"), target=target, precision="fp16")
        >>> vpdeploy.load(report.path).tasks
        ('pets',)
    """
    # Refuse what does not go together before anything is loaded.
    check_opset(DEFAULT_OPSET if opset is None else opset)
    target.check(models, out, existing)
    if existing == "update":
        target.check_update(models, out, precision=precision, opset=opset)
        return _publish(out, models, images)
    precision, opset = precision or "fp32", DEFAULT_OPSET if opset is None else opset

    # Load every model, note what it answers, and compile its prompts.
    compiled = [CompiledModel.of(each, images) for each in models]
    expectations = [each.expectation for each in compiled]

    # Probe what a narrow graph has to leave in float32. The probed graph is built in the call, so that memory does not
    # hold it beside the graph that is written.
    probe = None
    if precision != "fp32":
        wide = target.assemble(compiled, "fp32")
        probe = probe_graph(wide.probed_graph(), wide.probe_inputs(), expectations, precision=precision)
    islands = NO_ISLANDS if probe is None else probe.islands

    # Build the graph and trace it into ONNX.
    assembly = target.assemble(compiled, "fp32" if islands.widen_prompts else precision)
    onnx_model = assembly.trace(precision=precision, opset=opset, islands=islands)
    probed = {} if probe is None else {"precision": probe.to_fields()}
    facts = GraphFacts(
        precision=precision,
        opset=opset,
        image_input=assembly.image_input,
        details={"graph": graph_facts(onnx_model, assembly.sizes), **probed},
    )

    # Write it aside, compare it with the trained models, and publish it with the comparison on its card.
    with staging_folder(out) as folder:
        path = folder / assembly.file_name(out)
        staged = assembly.staged(path, facts, save_model(onnx_model, path))
        reports = run_gate(staged, expectations)
        if not all(report.passed for report in reports):
            require_parity(reports, advice=advise_export(staged, expectations))
        size_bytes = assembly.publish(staged, reports, out, existing)
    return ExportReport(
        path=out,
        precision=precision,
        opset=opset,
        size_bytes=size_bytes,
        parity=tuple(reports),
        prompt_bytes=assembly.prompt_bytes(precision),
        probe=probe,
    )


def add_task(path: Path, model: TrainedModel, *, images: Path | None = None) -> Addition:
    """Compile a model for an existing bundle, compare it in the bundle's own graph, and publish it.

    Args:
        path: The bundle.
        model: The model; a task of its name gets a new version.
        images: A folder of images for the parity gate; None takes the model's own.

    Returns:
        The version that is now served, and the comparison.

    Raises:
        BundleError: The bundle or the run cannot be used.
        SpecError: The task cannot share a graph, or the backbone's weights cannot be had.
        LayoutMismatchError: The model belongs to another backbone or preprocessing, or the graph has no place for it.
        ParityError: The graph does not reproduce the trained model; the bundle is as it was.

    Example:
        >>> added = vpdeploy_export.add_task(bundle, vpdeploy_export.TrainedModel.of_run(flowers_run))
        >>> added.version, added.parity.task
        (2, 'flowers')
    """
    # Refuse before it is compiled: only prompts of this backbone have the layout's tensors.
    require_prompts(model)
    check_update(path, [model.card])
    report = _publish(path, [model], images)
    (parity,) = report.parity
    return Addition(version=report.versions[parity.task], parity=parity)


def _publish(path: Path, models: Sequence[TrainedModel], images: Path | None) -> ExportReport:
    """Publish models in a bundle's own graph, all at one moment.

    Raises:
        As ``add_task``.
    """
    # Load, compile, and bring into the bundle's layout.
    bundle = Bundle.open(path)
    artifact = Artifact.of_bundle(bundle)
    compiled = [CompiledModel.of(model, images) for model in models]
    layout = bundle.manifest.layout
    prompt_sets = [pack(each.prompts, each.model.head, each.card, layout, each.model.trunk) for each in compiled]

    # Compare in the bundle's own graph, and publish with the comparison on the cards.
    reports = run_gate(artifact.with_prompt_sets(prompt_sets), [each.expectation for each in compiled])
    require_parity(reports, advice=advise_addition(artifact.precision))
    published = [
        with_details(prompt_set, parity=report.to_fields())
        for prompt_set, report in zip(prompt_sets, reports, strict=True)
    ]
    versions = publish_tasks(path, published, graph_sha256=artifact.sha256)
    for card in [each.card for each in compiled]:
        _warn_of_other_classes(bundle, card)
    return ExportReport(
        path=path,
        precision=artifact.precision,
        opset=artifact.opset,
        size_bytes=artifact.graph_bytes,
        parity=tuple(reports),
        prompt_bytes={prompt_set.card.name: prompt_set.size_bytes for prompt_set in prompt_sets},
        versions=versions,
    )


def _warn_of_other_classes(before: Bundle, card: TaskCard) -> None:
    """Say so where a task's new version answers with other classes: perhaps another task bears the same name."""
    if card.name not in before.tasks:
        return
    try:
        old = before.read_task(card.name).card.labels
    except (BundleError, LayoutMismatchError):  # damaged, or replaced meanwhile: there is nothing to compare with
        return
    if old != card.labels:
        logger.warning(
            "task '%s' has other classes than before (%d, now %d); if another task was meant, train it with "
            "another --name and run: vpdeploy task rollback %s %s",
            card.name,
            len(old),
            len(card.labels),
            shell_path(before.path),
            card.name,
        )
