"""From runs to a bundle: compile, write aside, compare, and only then publish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vpdeploy.artifact import Artifact
from vpdeploy.bundle import Bundle, check_replaceable, publish_task, write_bundle
from vpdeploy.datafile import graph_size_bytes
from vpdeploy.errors import SpecError
from vpdeploy.graphfacts import GraphFacts, Precision
from vpdeploy.layout import SLOT_AXIS, Family, Layout
from vpdeploy.manifest import GRAPH_FILE, BundleFacts
from vpdeploy.promptset import CompiledPromptSet
from vpdeploy.table import common_sizes
from vpdeploy_export.exporting import ExportReport
from vpdeploy_export.facts import graph_details
from vpdeploy_export.graph import SwitchableGraph
from vpdeploy_export.loaded import DEFAULT_OPSET, TORCH_DTYPES, LoadedRun
from vpdeploy_export.packing import check_switchable, choose_layout, pack, with_details
from vpdeploy_export.parity import ParityReport, require_parity
from vpdeploy_export.precision.advice import advise_addition, advise_export
from vpdeploy_export.precision.gate import run_gate
from vpdeploy_export.precision.islands import NO_ISLANDS
from vpdeploy_export.precision.probing import PROBE_OPSET, probe_switchable
from vpdeploy_export.saving import save_model
from vpdeploy_export.writer import build_switchable, check_opset
from vpdeploy_train.methods import method_of_run
from vpdeploy_train.run import Run


def export_bundle(
    paths: Sequence[Path],
    out: Path,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    family: Family | None = None,
    images: Path | None = None,
    weights: Path | None = None,
) -> ExportReport:
    """Write runs as a bundle: one switchable graph and a compiled prompt set for each task.

    Args:
        paths: The run folders; one backbone, image size and normalisation, different task names.
        out: The folder; an existing bundle there keeps its state until the new one is complete.
        precision: ``fp16`` and ``bf16`` write a graph of that type; what would overflow it stays float32.
        opset: One of ``OPSETS``.
        family: Kinds of prompts the graph has place for; None takes what the runs need.
        images: A folder of images for the parity gate; None takes each run's validation images.
        weights: Where the backbone's weights file lies now.

    Raises:
        BundleError: A run cannot be read, or ``out`` is something else.
        SpecError: The runs do not go together, options do not fit, or the backbone's weights cannot be had.
        ExportError: Prompts do not fit the precision, or the graph cannot be written.
        ParityError: The graph does not reproduce a trained model; nothing is written.
    """
    check_opset(opset)
    check_replaceable(out)
    runs = [Run.read(path) for path in paths]
    _require_compatible(runs)
    backbone = runs[0].load_backbone(weights=weights)
    preprocessing = runs[0].card.preprocessing
    loaded = [LoadedRun.load(run, backbone, images=images) for run in runs]
    for each in loaded:
        check_switchable(each.prompts, each.card)
    compiled = {each.card.name: each.prompts for each in loaded}
    identity = runs[0].card.backbone
    expectations = [each.expectation for each in loaded]

    def pack_all(precision: Precision) -> tuple[Layout, list[CompiledPromptSet]]:
        layout = choose_layout(compiled, identity, backbone.trunk, precision=precision, family=family)
        return layout, [pack(each.prompts, each.model.head, each.card, layout, backbone.trunk) for each in loaded]

    probe, table_precision = None, precision
    if precision != "fp32":
        layout, prompt_sets = pack_all("fp32")
        # Built in the call, so that memory does not hold it beside the graph that is written.
        probe = probe_switchable(
            SwitchableGraph(backbone.trunk, preprocessing, layout, dtype=TORCH_DTYPES["fp32"], opset=PROBE_OPSET),
            layout,
            prompt_sets,
            expectations,
            precision=precision,
        )
        table_precision = "fp32" if probe.islands.widen_prompts else precision
    layout, prompt_sets = pack_all(table_precision)
    graph = SwitchableGraph(
        backbone.trunk,
        preprocessing,
        layout,
        dtype=TORCH_DTYPES[precision],
        opset=opset,
        islands=NO_ISLANDS if probe is None else probe.islands,
    )
    onnx_model = build_switchable(graph, preprocessing, layout, opset=opset)
    sizes = common_sizes([prompt_set.sizes() for prompt_set in prompt_sets])
    details = graph_details(onnx_model, {**sizes, SLOT_AXIS: len(prompt_sets)}, probe)
    facts = BundleFacts(
        backbone=identity,
        preprocessing=preprocessing,
        layout=layout,
        graph=GraphFacts(precision=precision, opset=opset, image_input="uint8", details=details),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the bundle, so that publishing is a rename on one file system.
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as folder:
        staged = Path(folder) / GRAPH_FILE
        data = save_model(onnx_model, staged, {})
        size_bytes = graph_size_bytes(staged)
        artifact = Artifact.of_staged(staged, facts, prompt_sets, data=data)
        reports = run_gate(artifact, expectations)
        if not all(report.passed for report in reports):
            require_parity(reports, advice=advise_export(artifact, expectations))
        prompt_sets = [
            with_details(prompt_set, parity=report.to_fields())
            for prompt_set, report in zip(prompt_sets, reports, strict=True)
        ]
        write_bundle(out, facts, prompt_sets, staged, data=data)
    return ExportReport(
        path=out,
        precision=precision,
        opset=opset,
        size_bytes=size_bytes,
        parity=tuple(reports),
        prompt_bytes={prompt_set.card.name: prompt_set.size_bytes for prompt_set in prompt_sets},
        probe=probe,
    )


def add_to_bundle(
    bundle_path: Path, path: Path, *, images: Path | None = None, weights: Path | None = None
) -> tuple[int, ParityReport]:
    """Compile a run for an existing bundle, compare it in the bundle's own graph, and publish it.

    Returns:
        The version that is now served, and the comparison.

    Raises:
        BundleError: The bundle or the run cannot be used.
        LayoutMismatchError: The run belongs to another backbone or preprocessing.
        ParityError: The graph does not reproduce the trained model; the bundle is as it was.
    """
    bundle = Bundle.open(bundle_path)
    manifest = bundle.manifest
    run = Run.read(path)
    _require_prompts(run)
    manifest.check_card(run.card)  # before it is compiled: only prompts of this backbone have the layout's tensors
    backbone = run.load_backbone(weights=weights)
    loaded = LoadedRun.load(run, backbone, images=images)
    prompt_set = pack(loaded.prompts, loaded.model.head, loaded.card, manifest.layout, backbone.trunk)
    artifact = Artifact.of_bundle(bundle).with_prompt_sets([prompt_set])
    (report,) = run_gate(artifact, [loaded.expectation])
    require_parity([report], advice=advise_addition(artifact.precision))
    version = publish_task(bundle_path, with_details(prompt_set, parity=report.to_fields()))
    return version, report


def _require_compatible(runs: Sequence[Run]) -> None:
    """Refuse runs that one graph cannot serve, by name.

    Raises:
        SpecError: Different backbones, sizes or normalisation, or the same task name twice.
    """
    first = runs[0]
    seen: dict[str, Path] = {}
    for run in runs:
        _require_prompts(run)
        name = run.card.name
        if name in seen:
            raise SpecError(f"{seen[name]} and {run.path} are both task '{name}'; train one with another --name")
        seen[name] = run.path
        if run.card.backbone.name != first.card.backbone.name:
            raise SpecError(
                f"{first.path} and {run.path} have different backbones: {first.card.backbone.name} and "
                f"{run.card.backbone.name}; export them into two bundles"
            )
        if difference := first.card.preprocessing.difference(run.card.preprocessing):
            raise SpecError(
                f"{first.path} and {run.path} preprocess differently: {difference}; export them into two bundles"
            )
        if run.card.backbone.sha256 != first.card.backbone.sha256:
            raise SpecError(
                f"{first.path} and {run.path} have different weights of {run.card.backbone.name} "
                f"({first.card.backbone.sha256[:12]} and {run.card.backbone.sha256[:12]}); export them into two bundles"
            )


def _require_prompts(run: Run) -> None:
    """Refuse runs whose method leaves its mark on the backbone.

    Raises:
        SpecError: The task cannot share a graph; the message says what to do.
    """
    if method_of_run(run.card.method).form == "weights":
        raise SpecError(
            f"{run.path}: method '{run.card.method}' changes the backbone's weights, so the task cannot share a graph "
            "with others; export it alone as FILE.onnx, or train prompts"
        )
