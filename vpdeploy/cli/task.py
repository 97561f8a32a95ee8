"""``vpdeploy task``: change what a bundle holds. A running server follows within seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vpdeploy.cli import exits
from vpdeploy.errors import BundleError, LayoutMismatchError

BundlePath = Annotated[Path, typer.Argument(help="A bundle folder.", show_default=False)]
TaskName = Annotated[str, typer.Argument(help="The task's name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_tasks(bundle: BundlePath, as_json: AsJson = False) -> None:
    """List the tasks of a bundle: served version, kept versions, classes, prompts, bytes. Exit 1 if one is damaged."""
    from vpdeploy.format.bundle import Bundle

    opened = Bundle.open(bundle)
    rows: list[dict[str, Any]] = []
    damages = []
    for name, entry in opened.manifest.tasks.items():
        try:
            prompt_set = opened.read_task(name)
        except (BundleError, LayoutMismatchError) as error:
            damages.append(f"task '{name}': {error}")
            rows.append({"task": name, "version": entry.version, "versions": sorted(entry.files), "damage": str(error)})
            continue
        sizes = prompt_set.sizes()
        rows.append(
            {
                "task": name,
                "version": entry.version,
                "versions": sorted(entry.files),
                "classes": len(prompt_set.card.labels),
                "prefix": sizes.get("prefix", 0),
                "generated": sizes.get("generated", 0),
                "size_bytes": prompt_set.size_bytes,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        for row in rows:
            typer.echo(f"{row['task']:<24} version {row['version']} of {row['versions']}, {_contents(row)}")
    if damages:
        exits.exit_damaged(damages)


def remove(bundle: BundlePath, task: TaskName, as_json: AsJson = False) -> None:
    """Remove a task and all its versions from a bundle."""
    from vpdeploy.format.bundle import withdraw_task

    versions = withdraw_task(bundle, task)
    if as_json:
        typer.echo(json.dumps({"task": task, "versions": versions}, indent=2))
        return
    typer.echo(f"removed {task} from {bundle}")


def rollback(bundle: BundlePath, task: TaskName, as_json: AsJson = False) -> None:
    """Serve a task's previous version again."""
    from vpdeploy.format.bundle import roll_back_task

    version = roll_back_task(bundle, task)
    if as_json:
        typer.echo(json.dumps({"task": task, "version": version}, indent=2))
        return
    typer.echo(f"{task} in {bundle} is at version {version} again")


def _contents(row: dict[str, Any]) -> str:
    """Return what a listed task holds, in words."""
    if "damage" in row:
        return "damaged"
    prompts = max(row["prefix"], row["generated"])
    return f"{row['classes']} classes, {prompts} prompts a block, {row['size_bytes'] / 1000:.0f} kB"
