"""From a run to a folded model: compile, write aside, compare, and only then put in place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vpdeploy.backends import open_backend
from vpdeploy.deployed import DeployedGraph
from vpdeploy.errors import BundleError
from vpdeploy.files import replacing_file
from vpdeploy.folded import FoldedCard
from vpdeploy.manifest import Precision
from vpdeploy.session import Session
from vpdeploy_export.compilation import CompiledPrompts, deployed_trunk
from vpdeploy_export.graph import FoldedGraph, ImageInput
from vpdeploy_export.loaded import DEFAULT_OPSET, GATE_RUNTIME, TORCH_DTYPES, LoadedRun
from vpdeploy_export.parity import ParityReport, compare, require_parity
from vpdeploy_export.saving import save_model
from vpdeploy_export.writer import build_folded, check_opset
from vpdeploy_train.run import Run


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
    loaded = LoadedRun.load(run, run.load_backbone(weights=weights), images=images)
    prompts, head = loaded.prompts.merged(), loaded.model.head
    graph = FoldedGraph(
        deployed_trunk(loaded.model),
        run.card.preprocessing,
        prompts,
        head,
        dtype=TORCH_DTYPES[precision],
        image_input=image_input,
        opset=opset,
    )
    onnx_model = build_folded(graph, run.card.preprocessing, opset=opset)
    with replacing_file(out) as temporary:
        save_model(onnx_model, temporary, {})
        unproven = FoldedCard(task=run.card, precision=precision, opset=opset)
        with Session(
            open_backend(DeployedGraph.of_folded(temporary, unproven), runtime=GATE_RUNTIME),
            preprocessing=run.card.preprocessing,
            precision=precision,
            folded=run.card,
        ) as session:
            (report,) = compare(session, [loaded.expectation], precision=precision)
        require_parity([report])
        card = replace(loaded.card, details={**loaded.card.details, "parity": report.to_fields()})
        folded = FoldedCard(task=card, precision=precision, opset=opset)
        save_model(onnx_model, temporary, folded.to_metadata())
    return ExportReport(
        path=out,
        precision=precision,
        opset=opset,
        size_bytes=out.stat().st_size,
        parity=(report,),
        prompt_bytes={run.card.name: _folded_bytes(prompts, head, precision)},
    )


def _folded_bytes(prompts: CompiledPrompts, head: nn.Linear, precision: Precision) -> int:
    """Return what the task's constants take in the graph."""
    numbers = sum(array.size for array in (prompts.inserted, prompts.pooled) if array is not None)
    for block in prompts.blocks:
        made = block.generator
        numbers += block.key.size + block.value.size
        if made is not None:
            numbers += sum(array.size for array in (made.mix, made.scale, made.shift, made.down, made.up))
    return numbers * (2 if precision == "fp16" else 4) + sum(each.numel() * 4 for each in head.parameters())
