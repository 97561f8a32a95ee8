"""``vpdeploy build``: compile a bundle's graph or a folded model into an engine for named GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpdeploy.engines.toolkit import TOOLKITS

if TYPE_CHECKING:
    from vpdeploy.engines.building import BuildRequest, BuildResult
    from vpdeploy.format.artifact import Artifact

_SIZES = "as MIN:OPT:MAX or one number"


def build(
    path: Annotated[Path, typer.Argument(help="A bundle folder, or a task's .onnx file.", show_default=False)],
    runtime: Annotated[
        str | None, typer.Option(help=f"{' or '.join(TOOLKITS)}; default: the one that fits.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="GPU architectures, e.g. sm_86,sm_89; default: this machine's GPU.", show_default=False),
    ] = None,
    batch: Annotated[str | None, typer.Option(help=f"Images in a batch, {_SIZES}; default: 1:8:32.")] = None,
    slots: Annotated[str | None, typer.Option(help=f"Tasks in the table, {_SIZES}; default: up to 1024.")] = None,
    prefix: Annotated[str | None, typer.Option(help=f"Prefix length, {_SIZES}; default: 64 or more.")] = None,
    generated: Annotated[str | None, typer.Option(help=f"Adaptive prompts, {_SIZES}; default: up to 64.")] = None,
    hidden: Annotated[str | None, typer.Option(help=f"Hidden units of them, {_SIZES}; default: up to 64.")] = None,
    classes: Annotated[str | None, typer.Option(help=f"Classes of a task, {_SIZES}; default: up to 1024.")] = None,
    workspace_mb: Annotated[
        int | None, typer.Option(min=1, help="Scratch memory that layers may use; default: the GPU's.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: let later versions load it, too.")
    ] = False,
    hardware: Annotated[
        str, typer.Option(help="TensorRT: let other GPUs load it, too: none, same-sm or ampere+.")
    ] = "none",
    weight_stripped: Annotated[
        bool, typer.Option("--weight-stripped", help="Leave the weights out; they are read from the graph at loading.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build even if the same engine is there.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Then remove engines of graphs that are no longer there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build an engine of PATH, for this machine's GPU or ahead of time for others."""
    from vpdeploy.engines.building import BuildRequest
    from vpdeploy.engines.plan import EngineOptions
    from vpdeploy.engines.profile import Profile
    from vpdeploy.engines.target import parse_targets
    from vpdeploy.engines.toolkit import choose_runtime
    from vpdeploy.format.artifact import Artifact
    from vpdeploy.machine import find_gpu

    asked = {
        "batch": batch,
        "slots": slots,
        "prefix": prefix,
        "generated": generated,
        "hidden": hidden,
        "classes": classes,
    }
    profile = Profile.parse(asked)
    targets = None if target is None else parse_targets(target)
    artifact = Artifact.open(path)
    if runtime is None:
        runtime, reason = choose_runtime(targets, find_gpu())
        typer.echo(f"runtime {runtime}: {reason}", err=True)
    request = BuildRequest(
        runtime=runtime,
        targets=targets,
        profile=profile,
        options=EngineOptions(
            version_compatible=version_compatible,
            weight_stripped=weight_stripped,
            hardware=hardware,
            workspace_bytes=None if workspace_mb is None else workspace_mb * 2**20,
        ),
        force=force,
    )
    result = _build_with_bar(artifact, request)
    _report(artifact, result, prune=prune, as_json=as_json)


def _build_with_bar(artifact: Artifact, request: BuildRequest) -> BuildResult:
    """Build with a progress bar on stderr, if that is a terminal."""
    from vpdeploy.cli.native_output import without_lines
    from vpdeploy.engines.building import build_engine
    from vpdeploy.progress import ProgressBar

    # Myelin, NVIDIA's compiler, prints its failures besides logging them; the error that is raised says them.
    with (
        without_lines(b"Internal Error: Myelin") as stderr,
        ProgressBar("building", stream=stderr) as bar,
    ):
        return build_engine(artifact, request, on_progress=bar.show)


def _report(artifact: Artifact, result: BuildResult, *, prune: bool, as_json: bool) -> None:
    from vpdeploy.engines.store import leftover_engines, remove_engines
    from vpdeploy.engines.target import MODELS

    leftovers = leftover_engines(artifact)
    if prune:
        remove_engines(leftovers)
    card, path = result.engine.card, result.engine.path
    if as_json:
        report: dict[str, Any] = {
            "path": str(path),
            "built": result.built,
            "repaired": result.repaired,
            "leftover": [] if prune else [str(each) for each in leftovers],
            "removed": [str(each) for each in leftovers] if prune else [],
            **card.to_fields(),
        }
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    if result.repaired is not None:
        typer.echo(f"replaced: {result.repaired}", err=True)
    done = f"built in {card.build_seconds:.1f} s" if result.built else "is there already; --force builds it again"
    typer.echo(f"{path}: {card.size_bytes / 1e6:.1f} MB, {done}")
    gpus = (
        [card.gpu_name or ""]
        if card.gpu_name
        else [f"{sm} ({MODELS[sm]})" if sm in MODELS else sm for sm in card.targets]
    )
    typer.echo(f"  for      {'; '.join(gpus)}")
    typer.echo(f"  runtime  {card.runtime} {card.runtime_version}, {card.precision}")
    typer.echo(f"  holds    {card.profile}")
    for each in leftovers:
        state = "removed" if prune else "left over, --prune removes it"
        typer.echo(f"{each.name}: of a graph that is no longer here, or incomplete; {state}", err=True)
