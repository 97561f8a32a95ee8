"""``vpdeploy predict``: classify images from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpdeploy.backends import AUTO
from vpdeploy.cli.runtimes import RuntimeOption
from vpdeploy.cli.threads import Threads


def predict(
    model: Annotated[Path, typer.Argument(help="A bundle folder, or a task's .onnx file.", show_default=False)],
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="The task to ask; needed if the bundle holds several.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to print for each image.")] = 5,
    runtime: RuntimeOption = AUTO,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the most probable classes of each image."""
    from vpdeploy.session.session import load

    with load(model, runtime=runtime, threads=threads) as session:
        answers = session.predict(images, task, top=top)
    if as_json:
        rows = [
            {
                "image": str(path),
                "task": answer.task,
                "predictions": [
                    {"label": each.label, "index": each.index, "probability": each.probability}
                    for each in answer.ranking
                ],
            }
            for path, answer in zip(images, answers, strict=True)
        ]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for path, answer in zip(images, answers, strict=True):
        typer.echo(f"{path}  ({answer.task})")
        for each in answer.ranking:
            typer.echo(f"  {each.probability:7.2%}  {each.label}")
