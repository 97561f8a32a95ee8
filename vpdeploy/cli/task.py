"""``vpdeploy task``: change what a bundle holds. A running server follows within seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[Path, typer.Argument(help="A bundle folder.", show_default=False)]
TaskName = Annotated[str, typer.Argument(help="The task's name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_tasks(bundle: BundlePath, as_json: AsJson = False) -> None:
    """List the tasks of a bundle: served version, kept versions, classes, prompts, bytes."""
    from vpdeploy.format.bundle import Bundle

    opened = Bundle.open(bundle)
    rows = []
    for name, entry in opened.manifest.tasks.items():
        prompt_set = opened.read_task(name)
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
        return
    for row in rows:
        prompts = max(int(str(row["prefix"])), int(str(row["generated"])))
        typer.echo(
            f"{row['task']:<24} version {row['version']} of {row['versions']}, {row['classes']} classes, "
            f"{prompts} prompts a block, {int(str(row['size_bytes'])) / 1000:.0f} kB"
        )


def remove(bundle: BundlePath, task: TaskName) -> None:
    """Remove a task and all its versions from a bundle."""
    from vpdeploy.format.bundle import withdraw_task

    withdraw_task(bundle, task)
    typer.echo(f"removed {task} from {bundle}")


def rollback(bundle: BundlePath, task: TaskName) -> None:
    """Serve a task's previous version again."""
    from vpdeploy.format.bundle import roll_back_task

    version = roll_back_task(bundle, task)
    typer.echo(f"{task} in {bundle} is at version {version} again")
