"""``vpdeploy eval``: how good a run is on labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.cli.threads import Threads


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Data as for train; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Annotated[Path | None, typer.Option(help="Where the backbone's weights file lies now.")] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, the confusion matrix included.")] = False,
) -> None:
    """Print a run's accuracy on labelled images."""
    from vpdeploy_train.device import use_threads
    from vpdeploy_train.evaluation import evaluate_run
    from vpdeploy_train.run import Run

    use_threads(threads)
    found = evaluate_run(Run.read(run), data=data, split=split, batch_size=batch_size, device=device, weights=weights)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    result = found.evaluation
    typer.echo(f"{run}: {result.images} images of split '{split}'")
    typer.echo(f"accuracy {result.accuracy:.4f}, mean over classes {result.class_accuracy:.4f}, loss {result.loss:.4f}")
