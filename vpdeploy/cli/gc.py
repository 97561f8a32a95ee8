"""``vpdeploy gc``: remove what a bundle names no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.cli.task import AsJson, BundlePath


def collect(
    bundle: BundlePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what killed commands left in a bundle, and replaced or withdrawn files that no running server holds."""
    from vpdeploy.format.bundle import collect_leftovers

    found = collect_leftovers(bundle, dry_run=dry_run)
    removed = [each for each in found if not each.is_held]
    freed_bytes = sum(each.size_bytes for each in removed)
    if as_json:
        fields = {
            "path": str(bundle),
            "dry_run": dry_run,
            "removed": [each.to_json() for each in removed],
            "freed_bytes": freed_bytes,
            "held": [each.to_json() for each in found if each.is_held],
        }
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
        return
    for each in found:
        what = "held by a running process" if each.is_held else "would be removed" if dry_run else "removed"
        typer.echo(f"{_relative(each.path, bundle)}: {each.size_bytes / 1e6:.1f} MB, {what}")
    typer.echo(
        f"{bundle}: {len(removed)} leftovers, {freed_bytes / 1e6:.1f} MB{', nothing was removed' if dry_run else ''}"
    )


def _relative(path: Path, bundle: Path) -> Path:
    return path.relative_to(bundle) if path.is_relative_to(bundle) else path
