"""``vpdeploy eval``: how good a run is on labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.format.run import RunCard
from vpdeploy_train.cli.cache import Cache
from vpdeploy_train.cli.door import check_data, check_weights
from vpdeploy_train.data.example import SPLITS


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Data as for train; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Annotated[Path | None, typer.Option(help="Where the backbone's weights file lies now.")] = None,
    cache: Cache = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for pictures of the confusion and of every class's accuracy.")
    ] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be decoded, and count them.")
    ] = False,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every class and what is confused.")] = False,
) -> None:
    """Print a run's accuracy on labelled images."""
    if split not in SPLITS:
        raise SpecError(f"--split '{split}': choose one of {', '.join(SPLITS)}")
    RunCard.read(run)
    if data is not None:
        check_data(data)
    if weights is not None:
        check_weights(weights)

    from vpdeploy_train.device import use_threads
    from vpdeploy_train.evaluation import evaluate_run
    from vpdeploy_train.run import Run

    use_threads(threads)
    found = evaluate_run(
        Run.read(run),
        data=data,
        split=split,
        batch_size=batch_size,
        device=device,
        weights=weights,
        cache_bytes=cache,
        skip_corrupt=skip_corrupt,
    )
    if plots is not None:
        from vpdeploy_train.evaluation_pictures import plot_evaluation

        for picture in plot_evaluation(found, plots):
            typer.echo(f"written: {picture}", err=True)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())
