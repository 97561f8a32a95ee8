"""``vpdeploy inspect``: say what a run, a bundle or an exported ONNX file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a bundle or an .onnx file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain a run, a bundle or an exported ONNX file."""
    from vpdeploy.inspection import inspect_path, render_text

    report = inspect_path(path)
    typer.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else render_text(report))
