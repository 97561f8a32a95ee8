"""``vpdeploy export``: runs to a folded ONNX file or a bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.format.graphfacts import Precision
from vpdeploy.format.layout import Family
from vpdeploy.format.place import Existing, check_bundle_place, check_file_place, check_update
from vpdeploy.format.run import RunCard
from vpdeploy.text import shell_path
from vpdeploy_train.cli.door import check_weights


def export(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="task.onnx folds one run; any other name writes a bundle folder.")],
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Write a float16 graph; what would overflow stays float32.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Write a bfloat16 graph; no CPU runs it.")] = False,
    layout: Annotated[
        str | None, typer.Option(help="Bundle: prefix, adaptive or superset; default: what the runs need.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="20 (the default), or 23 for one Attention node a block.", show_default=False)
    ] = None,
    image_input: Annotated[
        str, typer.Option("--input", help="uint8 [B,H,W,3], or float: normalised [B,3,H,W] (folded only).")
    ] = "uint8",
    images: Annotated[
        Path | None, typer.Option(help="Images for the parity gate; default: the runs' validation images.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Where the backbone's weights file lies now.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Add the runs to the bundle at --out, in its own graph; all else stays.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop the bundle, or another task's model, that is at --out.")
    ] = False,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile runs into ONNX. Nothing is written unless the graph reproduces the trained models."""
    if image_input not in ("uint8", "float"):
        raise SpecError(f"--input '{image_input}': choose one of uint8, float")
    if layout is not None and layout not in get_args(Family):
        raise SpecError(f"--layout '{layout}': choose one of {', '.join(get_args(Family))}")
    if fp16 and bf16:
        raise SpecError("--fp16 and --bf16: a graph has one precision; give one of them")
    folded = out.suffix == ".onnx"
    if folded and layout is not None:
        raise SpecError("--layout is for bundles; a folded model holds what its one task needs")
    if folded and len(runs) != 1:
        raise SpecError(f"--out {out}: a folded model holds one task, {len(runs)} runs given; give a folder's name")
    if not folded and image_input != "uint8":
        raise SpecError("--input float is for folded models; a bundle takes uint8 images")

    if update and replace:
        raise SpecError("--update keeps what is at --out, --replace drops it; give one of them")
    existing: Existing = "update" if update else "replace" if replace else "refuse"
    precision: Precision | None = "fp16" if fp16 else "bf16" if bf16 else None
    # The types name the choices that were checked above.
    family: Family | None = layout  # type: ignore[assignment]
    cards = [RunCard.read(run).task for run in runs]
    _check_names(runs, [card.name for card in cards])
    if weights is not None:
        check_weights(weights)
    if folded:
        check_file_place(out, cards[0].name, existing)
    else:
        check_bundle_place(out, [card.name for card in cards], existing)
        if update:
            check_update(out, cards, precision=precision, opset=opset, family=family)

    from vpdeploy_export.export import export_model
    from vpdeploy_export.forms import DeployedForm, Folded, Switchable
    from vpdeploy_export.models import TrainedModel
    from vpdeploy_train.device import use_threads

    use_threads(threads)
    target: DeployedForm = Folded(image_input=image_input) if folded else Switchable(family=family)  # type: ignore[arg-type]
    models = TrainedModel.of_runs(runs, weights=weights)
    report = export_model(
        models, out, target=target, existing=existing, precision=precision, opset=opset, images=images
    )
    if as_json:
        typer.echo(json.dumps(report.to_fields(), indent=2, ensure_ascii=False))
        return
    typer.echo(f"{out}: {report.size_bytes / 1e6:.1f} MB, {report.precision}, opset {report.opset}")
    if report.probe is not None and report.probe.islands:
        typer.echo(f"  stays float32, or it could overflow: {report.probe.islands.describe()}")
    for parity in report.parity:
        version = f"version {report.versions[parity.task]}, " if parity.task in report.versions else ""
        typer.echo(
            f"  {parity.task}: {version}{report.prompt_bytes[parity.task] / 1000:.0f} kB, "
            f"max |Δ logit| {parity.max_abs_difference:.2g} (allowed {parity.allowed_difference:.2g}), "
            f"top-1 agreement {parity.top1_agreement:.1%} on {parity.source}"
        )
    quoted = shell_path(out)
    if report.precision == "bf16":  # which no CPU runs
        typer.echo(f"next: vpdeploy build {quoted}")
    else:
        typer.echo(f"next: vpdeploy {'predict' if folded else 'serve'} {quoted}{' IMAGE' if folded else ''}")


def _check_names(runs: Sequence[Path], names: Sequence[str]) -> None:
    """Refuse runs whose tasks have the same name: a bundle could not tell them apart.

    Raises:
        SpecError: Two have; the message says how to give one another name.
    """
    for index, name in enumerate(names):
        if name in names[:index]:
            first, second = runs[names.index(name)], runs[index]
            if first.resolve() == second.resolve():
                raise SpecError(f"{second}: was given twice; name each run once")
            command = f"vpdeploy train --out {shell_path(second)} --resume --name OTHER"
            raise SpecError(
                f"{first} and {second} are both task '{name}', and a bundle's tasks have names of their own; give "
                f"one another name: {command} (an imported run: import it again with --name)"
            )
