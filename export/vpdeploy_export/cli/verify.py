"""``vpdeploy verify``: the parity gate once more, on any images and runtimes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpdeploy.cli.threads import Threads
from vpdeploy.format.artifact import Artifact
from vpdeploy.format.run import RunCard
from vpdeploy.text import align
from vpdeploy_train.cli.door import check_weights

if TYPE_CHECKING:
    from vpdeploy_export.parity import ParityReport
    from vpdeploy_export.precision.bisection import Bisection

_TITLES = ("task", "images", "runtime", "max |Δ logit|", "allowed", "top-1", "")


def verify(
    path: Annotated[Path, typer.Argument(help="A bundle folder, or a task's .onnx file.", show_default=False)],
    run: Annotated[
        list[Path] | None,
        typer.Option(help="A run to compare with; repeat it. Default: the graph's own arithmetic in float32."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of images; default: the runs' validation images, or synthetic ones.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Where the backbone's weights file lies now.")] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="A runtime's name, auto, or emulated (rounded on the CPU); repeat it. Default: auto."),
    ] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Find the first value that leaves the tolerance.")] = False,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare an artifact's answers with its trained models', on any images and runtimes. Exits 4 if they differ."""
    if not path.exists():
        Artifact.open(path)  # says what it expected
    if weights is not None:
        check_weights(weights)
    for each in run or ():
        RunCard.read(each)

    from vpdeploy_export.models import TrainedModel
    from vpdeploy_export.verification import verify as verify_artifact
    from vpdeploy_train.device import use_threads

    use_threads(threads)
    models = TrainedModel.of_runs(run or (), weights=weights)
    report = verify_artifact(path, models=models, images=images, runtimes=runtime or (), bisects=bisect)
    if as_json:
        typer.echo(json.dumps(report.to_fields(), indent=2, ensure_ascii=False))
    else:
        typer.echo(f"{path} against {report.reference}")
        typer.echo(_render_parity(report.parity))
        if report.bisection is not None:
            typer.echo(_render_bisection(report.bisection))
    report.require()


def _render_parity(reports: tuple[ParityReport, ...]) -> str:
    rows = [_TITLES]
    sources: dict[str, str] = {}
    for each in reports:
        sources.setdefault(each.source, each.task)
        rows.append(
            (
                each.task,
                str(each.images),
                each.runtime,
                f"{each.max_abs_difference:.2g}" if math.isfinite(each.max_abs_difference) else "not finite",
                f"{each.allowed_difference:.2g}",
                f"{each.top1_agreement:.1%}",
                "" if each.passed else "MISSED",
            )
        )
    return "\n".join([_table(rows), *(f"  images: {source}" for source in sources)])


def _render_bisection(found: Bisection) -> str:
    rows = [("block", "part", "worst value", "error", "largest", "")]
    for each in found.worst_by_part():
        error = f"{each.relative_error:.1e}" if math.isfinite(each.relative_error) else "not finite"
        rows.append(
            (
                "" if each.location.block is None else str(each.location.block),
                each.location.part,
                each.location.name,
                error,
                f"{each.largest:.3g}",
                "" if each.relative_error <= found.tolerance else "MISSED",
            )
        )
    title = f"each value against float32, on {found.images} images; allowed {found.tolerance:.0e} of its largest"
    return "\n".join([title, _table(rows), found.describe()])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"  {line}" for line in align(rows, left=range(len(rows[0]))))
