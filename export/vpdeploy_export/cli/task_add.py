"""``vpdeploy task add``: publish a run into an existing bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.cli.task import AsJson
from vpdeploy.cli.threads import Threads
from vpdeploy.format.place import check_update
from vpdeploy.format.run import RunCard
from vpdeploy_train.cli.door import check_weights


def add(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.", show_default=False)],
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    images: Annotated[
        Path | None, typer.Option(help="Images for the parity gate; default: the run's validation images.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Where the backbone's weights file lies now.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Add a run to a bundle, or publish a new version of a task. A running server follows within seconds."""
    if weights is not None:
        check_weights(weights)
    check_update(bundle, [RunCard.read(run).task])

    from vpdeploy_export.export import add_task
    from vpdeploy_export.models import TrainedModel
    from vpdeploy_train.device import use_threads

    use_threads(threads)
    added = add_task(bundle, TrainedModel.of_run(run, weights=weights), images=images)
    report = added.parity
    if as_json:
        fields = {"task": report.task, "version": added.version, "parity": report.to_fields()}
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
        return
    typer.echo(
        f"{bundle}: task '{report.task}' at version {added.version}; max |Δ logit| {report.max_abs_difference:.2g} "
        f"(allowed {report.allowed_difference:.2g}) on {report.source}"
    )
