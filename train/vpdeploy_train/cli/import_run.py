"""``vpdeploy import``: a checkpoint of the public code becomes a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.text import shell_path
from vpdeploy_train.cli.door import check_backbone_name, check_file, check_weights
from vpdeploy_train.place import check_new_place, choose_task_name

FORMAT_NAMES: Final = ("e2vpt", "vapt", "vpt")
"""The names of ``vpdeploy_train.importing.FORMATS``, which loads torch."""


def import_run(
    file: Annotated[
        Path, typer.Argument(help="A torch file of the public VPT, E²VPT or VAPT code.", show_default=False)
    ],
    reference: Annotated[str, typer.Option("--format", help="vpt, e2vpt or vapt.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The run folder to write.", show_default=False)],
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads; default: from prompts, --backbone or a standard size.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class names: one a line, or a .json list; default: 0, 1, ...")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The task's name; default: the run folder's name.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="timm name of the backbone; needed where the file holds none.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of --backbone where the file holds none; default: timm's.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images where the file holds no backbone.")
    ] = None,
    resize: Annotated[str, typer.Option(help="crop (folders, FGVC) or squash (VTAB-1k).")] = "crop",
    crop_ratio: Annotated[
        float | None, typer.Option(help="Share of the scaled image that the crop keeps; default: 0.875, 224 of 256.")
    ] = None,
    interpolation: Annotated[str, typer.Option(help="bilinear or bicubic.")] = "bilinear",
    mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Of the normalisation, RGB; default: ImageNet's.")
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Of the normalisation, RGB; default: ImageNet's.")
    ] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Turn a checkpoint of the public VPT, E²VPT or VAPT code into a run."""
    if reference not in FORMAT_NAMES:
        raise SpecError(f"--format '{reference}': choose one of {', '.join(FORMAT_NAMES)}")
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "file not found"
        raise SpecError(f"{file}: {found}; expected a torch file of the public VPT, E²VPT or VAPT code")
    check_new_place(out)
    task = choose_task_name(out, name=name, resume=False)
    if backbone is not None:
        check_backbone_name(backbone)
    if labels is not None:
        check_file(labels)
    for given in (file, weights):
        if given is not None:
            check_weights(given)

    from vpdeploy_train.device import use_threads
    from vpdeploy_train.importing.backbone import BackboneChoice
    from vpdeploy_train.importing.importing import import_checkpoint
    from vpdeploy_train.importing.labels import read_labels
    from vpdeploy_train.importing.pipeline import Pipeline

    use_threads(threads)
    prepared = {"crop_ratio": crop_ratio, "mean": mean, "std": std}
    result = import_checkpoint(
        file,
        out,
        format=reference,
        name=task,
        backbone=BackboneChoice(name=backbone, heads=heads, weights=weights, image_size=image_size),
        pipeline=Pipeline(
            resize=resize,  # type: ignore[arg-type]
            interpolation=interpolation,  # type: ignore[arg-type]
            **{option: value for option, value in prepared.items() if value is not None},  # type: ignore[arg-type]
        ),
        labels=None if labels is None else read_labels(labels),
    )
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2, ensure_ascii=False))
        return
    card = result.run.card
    size = card.preprocessing.image_size
    typer.echo(f"{out}: task '{card.name}', {card.method}, {len(card.labels)} classes, on {card.backbone.name}")
    typer.echo(f"{result.prompts.parameters} prompt parameters; images {card.preprocessing.resize} to {size} px")
    typer.echo(f"next: vpdeploy export {shell_path(out)} --out {card.name}.onnx")
