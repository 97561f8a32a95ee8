"""From a run to a folded model: compile, write aside, compare, and only then put in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vpdeploy.artifact import Artifact
from vpdeploy.datafile import graph_size_bytes
from vpdeploy.errors import BundleError
from vpdeploy.folded import FoldedCard
from vpdeploy.graphfacts import GraphFacts, ImageInput, Precision
from vpdeploy_export.compilation import CompiledPrompts, deployed_trunk
from vpdeploy_export.facts import graph_details
from vpdeploy_export.graph import FoldedGraph
from vpdeploy_export.loaded import DEFAULT_OPSET, TORCH_DTYPES, LoadedRun
from vpdeploy_export.parity import ParityReport, require_parity
from vpdeploy_export.precision.advice import advise_export
from vpdeploy_export.precision.decision import PrecisionReport
from vpdeploy_export.precision.gate import run_gate
from vpdeploy_export.precision.islands import NO_ISLANDS
from vpdeploy_export.precision.probing import PROBE_OPSET, probe_folded
from vpdeploy_export.saving import publishing_model, save_model
from vpdeploy_export.writer import build_folded, check_opset
from vpdeploy_train.run import Run


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote.

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
        precision: ``fp16`` and ``bf16`` write a graph of that type; what would overflow it stays float32.
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
    loaded = LoadedRun.load(run, run.load_backbone(weights=weights), images=images)
    prompts, head = loaded.prompts, loaded.model.head
    trunk = deployed_trunk(loaded.model)
    probe = None
    if precision != "fp32":
        # Built in the call, so that memory does not hold it beside the graph that is written.
        probe = probe_folded(
            FoldedGraph(
                trunk,
                run.card.preprocessing,
                prompts,
                head,
                dtype=TORCH_DTYPES["fp32"],
                image_input="uint8",
                opset=PROBE_OPSET,
            ),
            loaded.expectation,
            precision=precision,
        )
    graph = FoldedGraph(
        trunk,
        run.card.preprocessing,
        prompts,
        head,
        dtype=TORCH_DTYPES[precision],
        image_input=image_input,
        opset=opset,
        islands=NO_ISLANDS if probe is None else probe.islands,
    )
    onnx_model = build_folded(graph, run.card.preprocessing, opset=opset)
    with publishing_model(out) as temporary:
        save_model(onnx_model, temporary, {})
        facts = GraphFacts(
            precision=precision, opset=opset, image_input=image_input, details=graph_details(onnx_model, {}, probe)
        )
        staged = Artifact.of_folded(temporary, FoldedCard(task=loaded.card, graph=facts))
        (report,) = run_gate(staged, [loaded.expectation])
        if not report.passed:
            require_parity([report], advice=advise_export(staged, [loaded.expectation]))
        card = replace(loaded.card, details={**loaded.card.details, "parity": report.to_fields()})
        save_model(onnx_model, temporary, FoldedCard(task=card, graph=facts).to_metadata())
    return ExportReport(
        path=out,
        precision=precision,
        opset=opset,
        size_bytes=graph_size_bytes(out),
        parity=(report,),
        prompt_bytes={run.card.name: _folded_bytes(prompts, head, precision)},
        probe=probe,
    )


def _folded_bytes(prompts: CompiledPrompts, head: nn.Linear, precision: Precision) -> int:
    """Return what the task's constants take in the graph."""
    numbers = sum(array.size for array in (prompts.inserted, prompts.pooled) if array is not None)
    for block in prompts.blocks:
        made = block.generator
        numbers += block.key.size + block.value.size
        if made is not None:
            numbers += sum(array.size for array in (made.mix, made.scale, made.shift, made.down, made.up))
    return numbers * (4 if precision == "fp32" else 2) + sum(each.numel() * 4 for each in head.parameters())
