"""``vpdeploy inspect``: say what a run, a bundle, an exported ONNX file or an engine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.cli import exits


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a bundle, an .onnx or an .engine file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a run, a bundle, an exported ONNX file or an engine, and what can run it here; exit 1 if damaged."""
    from vpdeploy.inspection.rendering import render_text
    from vpdeploy.inspection.report import inspect_path

    report = inspect_path(path)
    typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if as_json else render_text(report))
    if report.damage:
        exits.exit_damaged(report.damage)
