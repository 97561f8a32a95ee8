"""From runs to a folded model or a bundle: compile, write aside, compare, and only then publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vpdeploy.backends import open_backend
from vpdeploy.bundle import Bundle, check_replaceable, publish_task, write_bundle
from vpdeploy.errors import BundleError, SpecError
from vpdeploy.files import replacing_file
from vpdeploy.folded import FoldedCard
from vpdeploy.manifest import GRAPH_FILE, Manifest, Precision
from vpdeploy.promptset import CompiledPromptSet
from vpdeploy.session import Session
from vpdeploy.task import TaskCard, check_task_name
from vpdeploy_export.compilation import compile_prefix, compile_prompt_set, merge_equal_columns, with_details
from vpdeploy_export.graph import FoldedGraph, SwitchableGraph
from vpdeploy_export.images import gate_images
from vpdeploy_export.parity import Expectation, ParityReport, compare, expected_logits, require_parity
from vpdeploy_export.patch_embedding import ImageInput
from vpdeploy_export.writer import build_folded, build_switchable, check_opset, save_model
from vpdeploy_train.backbone import Backbone
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.run import Run

DEFAULT_OPSET = 20

_TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_GATE_RUNTIME = "onnxruntime-cpu"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The file or folder.
        precision: ``fp32`` or ``fp16``.
        opset: ONNX opset.
        size_bytes: Of the graph's file.
        parity: One report for each task.
        prompt_bytes: Compiled bytes by task.
    """

    path: Path
    precision: Precision
    opset: int
    size_bytes: int
    parity: tuple[ParityReport, ...]
    prompt_bytes: dict[str, int]

    def to_fields(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "path": str(self.path),
            "precision": self.precision,
            "opset": self.opset,
            "size_bytes": self.size_bytes,
            "prompt_bytes": self.prompt_bytes,
            "parity": {report.task: report.to_fields() for report in self.parity},
        }


def export_folded(
    path: Path,
    out: Path,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    image_input: ImageInput = "uint8",
    images: Path | None = None,
    weights: Path | None = None,
) -> ExportReport:
    """Write one run as a self-contained ONNX file, prompts and head folded in.

    Args:
        path: The run folder.
        out: The file; it appears only if the graph reproduces the trained model.
        precision: ``fp16`` writes a float16 graph from a float16 model.
        opset: One of ``OPSETS``.
        image_input: Form of the graph's ``image`` input.
        images: A folder of images for the parity gate; None takes the run's validation images.
        weights: Where the backbone's weights file lies now.

    Raises:
        BundleError: The run cannot be read, or ``out`` is a folder.
        SpecError: Options do not fit, or the backbone's weights cannot be had.
        ExportError: The prompts do not fit the precision, or the graph cannot be written.
        ParityError: The graph does not reproduce the trained model; nothing is written.
    """
    check_opset(opset)
    if out.is_dir():
        raise BundleError(f"{out}: is a folder; give the name of an .onnx file")
    run = Run.read(path)
    backbone = run.load_backbone(weights=weights)
    model = run.load_model(backbone)
    expectation = _expectation(run, model, images)
    prefix = [merge_equal_columns(block) for block in compile_prefix(model)]
    graph = FoldedGraph(
        backbone.vit,
        run.card.preprocessing,
        prefix,
        model.head,
        dtype=_TORCH_DTYPES[precision],
        image_input=image_input,
        opset=opset,
    )
    onnx_model = build_folded(graph, run.card.preprocessing, opset=opset)
    width = sum(block.key.nbytes + block.value.nbytes for block in prefix) // 8
    prompt_bytes = width * (2 if precision == "fp16" else 4) + sum(p.numel() * 4 for p in model.head.parameters())
    with replacing_file(out) as temporary:
        save_model(onnx_model, temporary, {})
        with Session(
            open_backend(temporary, runtime=_GATE_RUNTIME),
            preprocessing=run.card.preprocessing,
            precision=precision,
            folded=run.card,
        ) as session:
            (report,) = compare(session, [expectation], precision=precision)
        require_parity([report])
        card = _published_card(run.card)
        card = replace(card, details={**card.details, "parity": report.to_fields()})
        folded = FoldedCard(task=card, precision=precision, opset=opset)
        save_model(onnx_model, temporary, folded.to_metadata())
    return ExportReport(
        path=out,
        precision=precision,
        opset=opset,
        size_bytes=out.stat().st_size,
        parity=(report,),
        prompt_bytes={run.card.name: prompt_bytes},
    )


def export_bundle(
    paths: Sequence[Path],
    out: Path,
    *,
    precision: Precision = "fp32",
    opset: int = DEFAULT_OPSET,
    images: Path | None = None,
    weights: Path | None = None,
) -> ExportReport:
    """Write runs as a bundle: one switchable graph and a compiled prompt set for each task.

    Args:
        paths: The run folders; one backbone, image size and normalisation, different task names.
        out: The folder; an existing bundle there keeps its state until the new one is complete.
        precision: ``fp16`` writes a float16 graph from a float16 model.
        opset: One of ``OPSETS``.
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
    prompt_sets, expectations = _compile_runs(runs, backbone, precision, images)
    layout = prompt_sets[0].layout
    graph = SwitchableGraph(
        backbone.vit, preprocessing, dtype=_TORCH_DTYPES[precision], image_input="uint8", opset=opset
    )
    onnx_model = build_switchable(graph, preprocessing, layout, opset=opset)
    manifest = Manifest(
        backbone=runs[0].card.backbone,
        preprocessing=preprocessing,
        layout=layout,
        precision=precision,
        opset=opset,
        graph_sha256="",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the bundle, so that publishing is a rename on one file system.
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as folder:
        staged = Path(folder) / GRAPH_FILE
        save_model(onnx_model, staged, {})
        size_bytes = staged.stat().st_size
        reports = _compare_bundle(staged, manifest, prompt_sets, expectations)
        require_parity(reports)
        prompt_sets = [
            with_details(prompt_set, parity=report.to_fields())
            for prompt_set, report in zip(prompt_sets, reports, strict=True)
        ]
        write_bundle(out, manifest, prompt_sets, staged)
    return ExportReport(
        path=out,
        precision=precision,
        opset=opset,
        size_bytes=size_bytes,
        parity=tuple(reports),
        prompt_bytes={prompt_set.card.name: prompt_set.size_bytes for prompt_set in prompt_sets},
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
    run = Run.read(path)
    backbone = run.load_backbone(weights=weights)
    precision = bundle.manifest.precision
    prompt_sets, expectations = _compile_runs([run], backbone, precision, images)
    bundle.check_fit(prompt_sets[0])
    (report,) = _compare_bundle(bundle.verified_graph(), bundle.manifest, prompt_sets, expectations)
    require_parity([report])
    version = publish_task(bundle_path, with_details(prompt_sets[0], parity=report.to_fields()))
    return version, report


def _compile_runs(
    runs: Sequence[Run], backbone: Backbone, precision: Precision, images: Path | None
) -> tuple[list[CompiledPromptSet], list[Expectation]]:
    """Compile every run, and note what each trained model answers."""
    prompt_sets, expectations = [], []
    for run in runs:
        check_task_name(run.card.name)
        model = run.load_model(backbone)
        expectations.append(_expectation(run, model, images))
        prompt_sets.append(compile_prompt_set(model, _published_card(run.card), precision=precision))
    return prompt_sets, expectations


def _compare_bundle(
    graph: Path, manifest: Manifest, prompt_sets: Sequence[CompiledPromptSet], expectations: Sequence[Expectation]
) -> list[ParityReport]:
    """Run the graph with all prompt sets in one table, their images mixed."""
    with Session(
        open_backend(graph, runtime=_GATE_RUNTIME),
        preprocessing=manifest.preprocessing,
        precision=manifest.precision,
        tasks=[(prompt_set, None) for prompt_set in prompt_sets],
    ) as session:
        return compare(session, expectations, precision=manifest.precision)


def _published_card(card: TaskCard) -> TaskCard:
    """Return the card as artifacts carry it: no search report, and of the trainer's own paths only the last part."""
    settings = dict(card.details.get("hyperparameters") or {})
    for name in ("data", "weights"):
        if name in settings:
            settings[name] = Path(str(settings[name])).name
    return replace(card, details={**card.details, "hyperparameters": settings, "pruning": None})


def _expectation(run: Run, model: PromptedViT, images: Path | None) -> Expectation:
    chosen = gate_images(run, images)
    return Expectation(
        task=run.card.name,
        pixels=chosen.pixels,
        logits=expected_logits(model, chosen.pixels, run.card.preprocessing),
        source=chosen.source,
    )


def _require_compatible(runs: Sequence[Run]) -> None:
    """Refuse runs that one graph cannot serve, by name.

    Raises:
        SpecError: Different backbones, sizes or normalisation, or the same task name twice.
    """
    first = runs[0]
    seen: dict[str, Path] = {}
    for run in runs:
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
