"""Exports of run folders, as the command makes them.

Needs torch and onnx; import it inside a fixture or from tests/export only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpdeploy.format.graphfacts import ImageInput
from vpdeploy.format.layout import Family
from vpdeploy_export import ExportReport, Folded, Switchable, TrainedModel, export_model
from vpdeploy_export.export import add_task
from vpdeploy_export.parity import ParityReport


def export_folded(
    run: Path, out: Path, *, image_input: ImageInput = "uint8", weights: Path | None = None, **options: Any
) -> ExportReport:
    """Export a run as a folded file."""
    model = TrainedModel.of_run(run, weights=weights)
    return export_model([model], out, target=Folded(image_input=image_input), **options)


def export_bundle(
    runs: Sequence[Path], out: Path, *, family: Family | None = None, weights: Path | None = None, **options: Any
) -> ExportReport:
    """Export runs as a bundle."""
    models = TrainedModel.of_runs(runs, weights=weights)
    return export_model(models, out, target=Switchable(family=family), **options)


def add_to_bundle(bundle: Path, run: Path, *, weights: Path | None = None, **options: Any) -> tuple[int, ParityReport]:
    """Add a run to a bundle: the version that is served then, and the comparison."""
    added = add_task(bundle, TrainedModel.of_run(run, weights=weights), **options)
    return added.version, added.parity
