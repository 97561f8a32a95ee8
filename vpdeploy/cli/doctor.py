"""``vpdeploy doctor``: say what is wrong with this machine, this installation or a bundle, and what mends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.cli import exits


def doctor(
    path: Annotated[
        Path | None, typer.Argument(help="A bundle, a run, an .onnx or an .engine file.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address that the server is to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that it is to listen on.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check driver, runtimes, packages, memory, port and PATH; print the command that mends each; exit 1 if wrong."""
    from vpdeploy.inspection.doctor import examine

    findings = examine(path, host=host, port=port)
    wrong = [finding for finding in findings if finding.status == "wrong"]
    if as_json:
        report = {"healthy": not wrong, "findings": [finding.to_json() for finding in findings]}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:<5}  {finding.subject:<{width}}  {finding.text}")
            if finding.mend is not None:
                typer.echo(f"{'':<5}  {'':<{width}}  mend: {finding.mend}")
    if wrong:
        raise typer.Exit(exits.KNOWN_ERROR)
