"""From trained models to what is deployed: compile, write aside, compare, and only then put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vpdeploy.format.artifact import Artifact
from vpdeploy.format.bundle import Bundle, publish_task
from vpdeploy.format.graphfacts import GraphFacts, Precision
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
    """

    path: Path
    precision: Precision
    opset: int
    size_bytes: int
    parity: tuple[ParityReport, ...]
    prompt_bytes: dict[str, int]
    probe: PrecisionReport | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "path": str(self.path),
            "precision": self.precision,
            "opset": self.opset,
            "size_bytes": self.size_bytes,
            "prompt_bytes": self.prompt_bytes,
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
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    images: Path | None = None,
) -> ExportReport:
    """Write trained models as what is deployed: a folded ONNX file, or a bundle.

    Args:
        models: One for a folded file; for a bundle of one backbone, image size and normalisation, and of different
            task names. ``TrainedModel.of_runs`` reads them from runs.
        out: The file or folder; it appears, or replaces what was there, only if the graph reproduces the models.
        target: ``Folded(...)`` or ``Switchable(...)``, with the options that belong to it.
        precision: ``fp16`` and ``bf16`` write a graph of that type; what would overflow it stays float32.
        opset: One of ``OPSETS``.
        images: A folder of images for the parity gate; None takes each model's own.

    Returns:
        What was written, with the comparison of every task.

    Raises:
        BundleError: A run is damaged, or ``out`` is something else.
        SpecError: The models do not go together, options do not fit, or a backbone's weights cannot be had.
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
        >>> report = vpdeploy_export.export_model([pets], Path("zoo"), target=target, precision="fp16")
        >>> vpdeploy.load(report.path).tasks
        ('pets',)
    """
    # Refuse what does not go together before anything is loaded.
    check_opset(opset)
    target.check(models, out)

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
        size_bytes = assembly.publish(staged, reports, out)
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
        LayoutMismatchError: The model belongs to another backbone or preprocessing.
        ParityError: The graph does not reproduce the trained model; the bundle is as it was.

    Example:
        >>> added = vpdeploy_export.add_task(bundle, vpdeploy_export.TrainedModel.of_run(flowers_run))
        >>> added.version, added.parity.task
        (2, 'flowers')
    """
    # Refuse before it is compiled: only prompts of this backbone have the layout's tensors.
    bundle = Bundle.open(path)
    require_prompts(model)
    bundle.manifest.check_card(model.card)

    # Load, compile, and bring into the bundle's layout.
    compiled = CompiledModel.of(model, images)
    prompts, head, trunk = compiled.prompts, compiled.model.head, compiled.model.trunk
    prompt_set = pack(prompts, head, compiled.card, bundle.manifest.layout, trunk)

    # Compare in the bundle's own graph, and publish with the comparison on the card.
    artifact = Artifact.of_bundle(bundle).with_prompt_sets([prompt_set])
    (report,) = run_gate(artifact, [compiled.expectation])
    require_parity([report], advice=advise_addition(artifact.precision))
    version = publish_task(path, with_details(prompt_set, parity=report.to_fields()))
    return Addition(version=version, parity=report)
