"""``vpdeploy quickstart``: see the whole main job done."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.text import shell_path


def quickstart(
    keep: Annotated[
        Path | None, typer.Option(help="Leave all files in this folder, which must be empty.", show_default=False)
    ] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train three tasks on real images, prune one, export, serve and ask them: a few minutes on a CPU."""
    if keep is not None and keep.exists() and (keep.is_file() or any(keep.iterdir())):
        raise SpecError(f"--keep {keep}: exists and is not empty; give another folder")

    from vpdeploy_export.quickstart.quickstart import render_table, run_quickstart
    from vpdeploy_train.device import use_threads

    use_threads(threads)

    def say(message: str) -> None:
        typer.echo(message, err=True)

    with TemporaryDirectory(prefix="vpdeploy-quickstart-") as temporary:
        folder = Path(temporary) if keep is None else keep
        result = run_quickstart(folder, say)
        if as_json:
            fields = result.to_fields()
            if keep is None:  # they go with the folder
                fields |= {"bundle": None, "folded": None}
            typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
            return
        typer.echo(render_table(result))
    typer.echo("\nTry next:")
    if keep is None:
        typer.echo("  vpdeploy quickstart --keep demo              the same, leaving all files")
    else:
        bundle, folded = (shell_path(path) for path in (result.bundle, result.folded))
        typer.echo(f"  vpdeploy serve {bundle}                      then ask it with curl or tritonclient")
        typer.echo(f"  vpdeploy inspect {folded}")
    typer.echo("  vpdeploy train --data YOUR_FOLDER --out runs/mine   a folder of images per class")
    typer.echo("  vpdeploy export runs/mine --out mine.onnx")
